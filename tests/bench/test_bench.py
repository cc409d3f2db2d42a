"""The benchmark measures what it claims: its arithmetic, the open loop against a server that stalls, equal peers."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import psutil
import pytest
import requests

from bench import capacity, flames, wrk
from bench.document import same_rate, targets
from bench.measure import Line, Ratio, Result, Sample, Subject, alternate, compare
from bench.peers import builds
from bench.peers.running import Peer, Peers
from bench.report import compact, text
from bench.rows.base import CANNOT_CARRY, Bench, add_latencies, compare_with, present
from bench.rows.edges import slope
from bench.wrk import LoadResult
from testkit.stack import ROOT, Stack, folder, wait_until

needs = pytest.mark.skipif(
    not all(shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") for program in ("wrk", "varnishd")),
    reason="needs the programs that ./run bench installs",
)


def load_result(rate: float) -> LoadResult:
    return LoadResult(round(rate), 1.0, 0, 1, 2, 3, 4, 5)


def sample(rate: float, **cpu: float) -> Sample:
    return Sample(load_result(rate), cpu, {})


# ---- arithmetic ----


def test_ratio_compares_rounds_in_pairs_and_is_the_median_of_them() -> None:
    samples = {"a": [sample(100), sample(300), sample(80)], "b": [sample(50), sample(100), sample(80)]}
    assert compare(samples, "a", "b") == Ratio(2.0, 1.0, 3.0)


def test_rate_per_cpu_second_leaves_out_the_load_generator() -> None:
    assert sample(100, edge=0.25, app=0.25, load=9).per_cpu_second == 200


def test_target_is_met_at_its_exact_value() -> None:
    assert Line("", "", Ratio.of([1.1]), 1.1).met
    assert not Line("", "", Ratio.of([1.09]), 1.1).met
    assert Line("", "", Ratio.of([5.0]), 5, at_most=True).met
    assert Line("", "", Ratio.of([5.0])).met is None


def test_subjects_are_measured_in_alternating_rounds() -> None:
    turns: list[str] = []

    def subject(name: str) -> Subject:
        def run(seconds: int) -> LoadResult:
            turns.append(name)
            return load_result(1)

        return Subject(name, run, {})

    alternate([subject("a"), subject("b")], rounds=2, seconds=1, warmup=1, show=lambda step: None)
    assert turns == ["a", "b", "a", "b", "a", "b"]


def test_peer_that_is_not_installed_is_skipped_with_the_reason() -> None:
    there, absent = Peer("FastAPI", "http://x", {}), Peer("Go", "", {}, missing="no golang")
    samples = {"velikiy": [sample(2)], "FastAPI": [sample(1)]}
    assert present([there, absent]) == [there]
    lines = [compare_with("Redis hit", samples, "velikiy", peer, 1.0) for peer in (there, absent)]
    assert [line.met for line in lines] == [True, None]
    assert text(lines[1]).split() == ["Redis", "hit", "velikiy", "/", "Go", "skipped:", "no", "golang"]
    written = targets({"redis": Result(lines).as_json()})
    assert "| Redis hit | velikiy / Go | skipped: no golang |" in written


def test_latencies_are_compared_at_80_percent_of_the_capacity_of_the_first_subject() -> None:
    rates: dict[str, list[float]] = {}

    def subject(name: str, p99: float) -> Subject:
        def run_at(_: int, rate: float) -> LoadResult:
            rates.setdefault(name, []).append(rate)
            return LoadResult(round(rate), 1.0, 0, 1, 2, p99, 4, 5)

        return Subject(name, lambda _: load_result(1), {}, run_at)

    subjects = [subject("velikiy", 3.0), subject("fast", 2.0), subject("slow", 1.0)]
    bench = Bench(cast(Peers, None), lambda _: None, quick=False, users=1, minutes=0)
    capacities = {"velikiy": [sample(1000)], "fast": [sample(800)], "slow": [sample(799)]}
    result = add_latencies(bench, Result([], capacities), "row", subjects)
    fast, slow = result.lines
    assert rates == {"velikiy": [800.0] * 3, "fast": [800.0] * 3}
    assert (fast.ratio, fast.met) == (Ratio(1.5, 1.5, 1.5), False)
    assert (slow.ratio, slow.met, slow.skipped) == (None, None, CANNOT_CARRY)
    written = same_rate({"row": result.as_json()["same_rate"]})
    assert "| row | velikiy | 800/s | 1.00 ms | 3.00 ms | 4.00 ms |" in written
    assert "slow" not in written


def test_cost_of_an_additional_edge_is_a_slope() -> None:
    assert slope([(1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)]) == pytest.approx(0.5)


def test_cores_needed_are_requests_times_their_cost() -> None:
    costs = {kind: dict.fromkeys(capacity.PIECES, 0.01) for kind in capacity.KINDS}  # 100,000 requests/s per core
    assert sum(capacity.SHARES.values()) == pytest.approx(1)
    assert capacity.cores_needed(costs)["app"] == pytest.approx(1 / capacity.MAX_UTILISATION)


def test_results_are_json_with_one_line_per_sample() -> None:
    value = {"rows": {"hit": {"samples": {"a": [{"requests": 1}, {"requests": 2}]}, "lines": []}}}
    text = compact(value)
    assert json.loads(text) == value
    assert '{"requests": 1},' in map(str.strip, text.splitlines())


def test_flame_graph_leaves_out_idle_threads_and_escapes_names() -> None:
    idle = "run (threading.py:1);worker (psycopg_pool/pool.py:5);get (queue.py:9) 70\n"
    root = flames.tree(f"a (velikiy/http/routes.py:1);<b> (x.py:2) 20\na (velikiy/http/routes.py:1) 10\n{idle}")
    assert root.count == 30
    assert root.callees["a (velikiy/http/routes.py:1)"].count == 30
    assert "&lt;b&gt; (x.py:2): 66.7 %" in flames.draw(root, "A read")


# ---- wrk ----


def test_output_of_wrk_is_parsed() -> None:
    text = 'Running 1s test @ http://x\n{"requests":2,"seconds":1.5,"failed":1,"recorded":2,"p50":1,"p90":2,"p99":3,"p999":4,"max":5}\n'
    assert wrk.parse(text, cpu=0.5) == LoadResult(2, 1.5, 1, 1, 2, 3, 4, 5, 0.5)


@contextmanager
def stalling(after: float = 0, seconds: float = 0, each: float = 0) -> Iterator[str]:
    """Run a server that responds after `each` seconds. It stalls once for `seconds`, this long `after` its first
    request."""
    began: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            began.append(time.monotonic())
            stall = began[0] + after
            now = time.monotonic()
            if stall <= now < stall + seconds:
                time.sleep(stall + seconds - now)
            time.sleep(each)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Ignore load generators that drop their connections at the end."""

    with Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@needs
@pytest.mark.exclusive
def test_open_loop_counts_the_wait_of_every_request_that_was_due_during_a_stall() -> None:
    # 200 requests/s for 2 s, of which the server stalls for 0.5 s: 100 of 400 requests wait 0 to 500 ms.
    with stalling(after=1.0, seconds=0.5) as url:
        found = wrk.open_loop(url, ("one", "/"), 2, rate=200, warmup=0, connections=4)
    assert found.max == pytest.approx(500, abs=60)
    assert found.p90 == pytest.approx(300, abs=60)  # 40 of 400 requests waited longer
    assert found.p50 < 60


@needs
def test_open_loop_reports_long_waits_for_a_server_that_is_too_slow_for_the_rate() -> None:
    # The server responds to 50 requests/s and 1000 are due. After 2 s only a tenth of them were sent, all in the warm-up.
    with stalling(each=0.02) as url:
        found = wrk.open_loop(url, ("one", "/"), 1, rate=1000, warmup=1, connections=1)
    assert found.p50 > 1500


# ---- peers ----


@needs
def test_every_peer_returns_the_same_body_for_the_same_user(stack: Stack) -> None:
    with folder() as directory, ExitStack() as context:
        peers = Peers(stack, directory, context)
        ours = requests.get(peers.velikiy.users(1), timeout=5)
        others = [peers.velikiy_app, peers.cache_aside, peers.cache_aside_uncached, peers.uncached]
        others += [peers.flask_caching, peers.fastapi, peers.varnish, peers.proxy_cache]
        built = present([peers.fastify, peers.go])
        others += [*built, *present([peers.haproxy])]
        for peer in others:
            for _ in range(2):  # the second response comes from the peer's cache
                response = requests.get(peer.users(1), timeout=5)
                assert (peer.name, plain(response.content)) == (peer.name, plain(ours.content))
        limit = requests.get(peers.limit.users(2), timeout=5)
        assert limit.content == ours.content
        assert set(ours.headers) == set(limit.headers)
        for peer in [peers.flask_caching, peers.fastapi, *built]:
            name = f"Charles of {peer.name}"
            requests.get(peer.users(3), timeout=5)  # fills the cache, from which the write has to delete
            changed = requests.put(peer.users(3), json={"name": f" {name} "}, timeout=5)
            assert changed.json() == {"message": "Updated"}
            assert requests.get(peer.users(3), timeout=5).json()["name"] == name
        for peer in built:
            for body in ({"name": "x" * 101}, {"name": " "}, {"email": "nobody"}, {"colour": "red"}):
                refused = requests.put(peer.users(3), json=body, timeout=5)
                assert (peer.name, body, refused.status_code // 100) == (peer.name, body, 4)
    with stack.redis() as server:
        server.flushall()  # peers change users without an invalidation


def test_peer_whose_language_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for build, reason in ((builds.go, "no golang"), (builds.fastify, "no node")):
        with pytest.raises(builds.NotBuilt, match=reason):
            build()


def plain(body: bytes) -> bytes:
    """Remove the zeros at the end of a second's fraction, which orjson writes and PostgreSQL does not."""
    return re.sub(rb"(\.[0-9]*?)0+\+", rb"\1+", body)


# ---- the end ----


@pytest.mark.long
@needs
def test_no_process_is_left_after_ctrl_c(tmp_path: Path) -> None:
    mark = f"bench-{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [ROOT / "run", "bench", "--quick", "--only", "hit"],
        env={**os.environ, "VELIKIY_BENCH_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: marked(mark, "varnishd"), within=60, what="the last peer")
        started = marked(mark)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr
        assert "nothing is left running" in process.stderr.read()
        wait_until(lambda: not any(it.is_running() for it in started), what="the end of all processes")
        assert not marked(mark)
    finally:
        process.kill()
        process.wait()
        for left in marked(mark):
            left.kill()


def marked(mark: str, name: str = "") -> list[psutil.Process]:
    """Return the processes of this name that have the mark in their environment; children inherit it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get("VELIKIY_BENCH_MARK") == mark and name in process.name():
                found.append(process)
    return found
