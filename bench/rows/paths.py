"""Where the app spends its time, as pictures for docs/benchmarks.md."""

from bench import flames
from bench.document import PICTURES
from bench.measure import Result
from bench.processes import Processes
from bench.rows.base import Bench, moving


def paths(bench: Bench) -> Result:
    """Of a miss and of a write, each through an edge. Under py-spy the app is slower, so nothing is measured here."""
    peers = bench.peers
    PICTURES.mkdir(exist_ok=True)
    workers = list(Processes(peers.roots_of_ours()).workers("app"))
    seconds = 3 if bench.quick else 10
    why = {}
    for name, kind, title in (("miss", "ids", "A miss"), ("put", "put", "A write, with two edges")):
        bench.say(title)
        if kind == "ids":
            peers.forget()
        load = moving(bench, peers.velikiy, kind, bench.users).load
        load(1)
        try:
            stacks = flames.record(workers, seconds, lambda load=load: load(seconds + 2))  # type: ignore[misc]
        except RuntimeError as failed:
            why[name] = str(failed)
            continue
        (PICTURES / f"{name}.svg").write_text(flames.draw(flames.tree(stacks), title))
    return Result(more={"no_picture": why} if why else {})
