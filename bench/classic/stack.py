"""The classic design, running: edges over one gunicorn, with PostgreSQL and Redis of a stack of ours."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from bench.servers import addresses, gunicorn, nginx
from testkit.stack import folder, running

TEMPLATE = Path(__file__).parent / "nginx.conf"


@contextmanager
def classic(edges: int) -> Iterator[list[str]]:
    """The addresses of its edges. What the stack of ours runs besides the two servers stands idle meanwhile."""
    with running("--edges", "1", "--apps", "1") as ours, folder() as place, ExitStack() as processes:
        app, *listen = addresses(1 + edges)
        cache = urlsplit(ours.redis_url)._replace(path="/1").geturl()  # ours is 0
        processes.enter_context(
            gunicorn("bench.classic.app:create_app()", app, DATABASE_URL=ours.postgres, REDIS_URL=cache)
        )
        for number, address in enumerate(listen, 1):
            processes.enter_context(nginx(TEMPLATE, place / f"edge{number}", address, APP=app))
        yield [f"http://{address}" for address in listen]
