"""Draw where the app spends its time, for docs/benchmarks.md."""

from bench import flames
from bench.document import PICTURES
from bench.measure import Result
from bench.processes import Processes
from bench.rows.base import Bench, cycling


def paths(bench: Bench) -> Result:
    """Draw a miss and a write, each through an edge. py-spy slows the app down, so this row measures nothing."""
    peers = bench.peers
    PICTURES.mkdir(exist_ok=True)
    workers = list(Processes(peers.stack_roots()).workers("app"))
    seconds = 3 if bench.quick else 10
    failures = {}
    for name, kind, title in (("miss", "ids", "A miss"), ("put", "put", "A write, with two edges")):
        bench.show(title)
        if kind == "ids":
            peers.empty_redis()
        run = cycling(bench, peers.velikiy, kind, bench.users).run
        run(1)
        try:
            stacks = flames.record(workers, seconds, lambda run=run: run(seconds + 2))  # type: ignore[misc]
        except RuntimeError as failed:
            failures[name] = str(failed)
            continue
        (PICTURES / f"{name}.svg").write_text(flames.draw(flames.tree(stacks), title))
    return Result(more={"no_picture": failures} if failures else {})
