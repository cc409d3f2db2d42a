"""Run the cache-aside service: edges in front of one gunicorn, with PostgreSQL and Redis of a velikiy stack."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.servers import addresses, gunicorn, nginx
from testkit.stack import folder, running

TEMPLATE = Path(__file__).parent / "nginx.conf"


@contextmanager
def cache_aside(edges: int) -> Iterator[list[str]]:
    """Yield the addresses of its edges. The stack's own edge and app are idle meanwhile."""
    with running("--edges", "1", "--apps", "1") as stack, folder() as directory, ExitStack() as processes:
        app, *listen = addresses(1 + edges)
        cache = stack.redis_database(1)  # the stack itself uses database 0
        processes.enter_context(
            gunicorn("bench.cache_aside.app:create_app()", app, DATABASE_URL=stack.postgres, REDIS_URL=cache)
        )
        for number, address in enumerate(listen, 1):
            processes.enter_context(nginx(TEMPLATE, directory / f"edge{number}", address, APP=app))
        yield [f"http://{address}" for address in listen]
