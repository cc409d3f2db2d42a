"""The bench measures what it says: its own arithmetic, the open loop against a server that stalls, equal peers."""

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

import psutil
import pytest
import requests

from bench import capacity, flames, wrk
from bench.measure import Contestant, Line, Ratio, Sample, alternate, compared
from bench.peers.running import Peers
from bench.report import compact
from bench.rows.edges import slope
from bench.wrk import Answered
from testkit.stack import ROOT, Stack, folder, wait_until

needs = pytest.mark.skipif(
    not all(shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") for program in ("wrk", "varnishd")),
    reason="what ./run bench installs is not here",
)


def answered(rate: float) -> Answered:
    return Answered(round(rate), 1.0, 0, 1, 2, 3, 4, 5)


def sample(rate: float, **cpu: float) -> Sample:
    return Sample(answered(rate), cpu, {})


# ---- arithmetic ----


def test_a_ratio_is_of_the_same_round_and_the_median_is_of_the_ratios() -> None:
    samples = {"a": [sample(100), sample(300), sample(80)], "b": [sample(50), sample(100), sample(80)]}
    assert compared(samples, "a", "b") == Ratio(2.0, 1.0, 3.0)


def test_by_cpu_time_the_load_generator_does_not_count() -> None:
    assert sample(100, edge=0.25, app=0.25, load=9).per_cpu_second == 200


def test_a_target_is_met_at_its_very_value() -> None:
    assert Line("", "", Ratio.of([1.1]), 1.1).met
    assert not Line("", "", Ratio.of([1.09]), 1.1).met
    assert Line("", "", Ratio.of([5.0]), 5, at_most=True).met
    assert Line("", "", Ratio.of([5.0])).met is None


def test_contestants_take_turns() -> None:
    turns: list[str] = []

    def contestant(name: str) -> Contestant:
        def load(seconds: int) -> Answered:
            turns.append(name)
            return answered(1)

        return Contestant(name, load, {})

    alternate([contestant("a"), contestant("b")], rounds=2, seconds=1, warmup=1, say=lambda what: None)
    assert turns == ["a", "b", "a", "b", "a", "b"]


def test_the_cost_of_an_edge_is_a_slope() -> None:
    assert slope([(1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)]) == pytest.approx(0.5)


def test_capacity_is_requests_times_their_cost() -> None:
    costs = {kind: dict.fromkeys(capacity.PIECES, 0.01) for kind in capacity.KINDS}  # 100,000 of each a second and core
    assert sum(capacity.SHARES.values()) == pytest.approx(1)
    assert capacity.needed(costs)["app"] == pytest.approx(1 / capacity.FULL)


def test_results_are_json_with_a_line_for_each_sample() -> None:
    value = {"rows": {"hit": {"samples": {"a": [{"requests": 1}, {"requests": 2}]}, "lines": []}}}
    text = compact(value)
    assert json.loads(text) == value
    assert '{"requests": 1},' in map(str.strip, text.splitlines())


def test_a_flame_graph_counts_what_works_and_is_well_formed() -> None:
    idle = "run (threading.py:1);worker (psycopg_pool/pool.py:5);get (queue.py:9) 70\n"
    root = flames.tree(f"a (velikiy/http/routes.py:1);<b> (x.py:2) 20\na (velikiy/http/routes.py:1) 10\n{idle}")
    assert root.count == 30
    assert root.callees["a (velikiy/http/routes.py:1)"].count == 30
    assert "&lt;b&gt; (x.py:2): 66.7 %" in flames.draw(root, "A read")


# ---- wrk ----


def test_what_wrk_says_is_read() -> None:
    text = 'Running 1s test @ http://x\n{"requests":2,"seconds":1.5,"failed":1,"recorded":2,"p50":1,"p90":2,"p99":3,"p999":4,"max":5}\n'
    assert wrk.parsed(text, cpu=0.5) == Answered(2, 1.5, 1, 1, 2, 3, 4, 5, 0.5)


@contextmanager
def stalling(after: float = 0, seconds: float = 0, each: float = 0) -> Iterator[str]:
    """A server that answers after `each` seconds, but once, so long after its first request, answers nobody for a while."""
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
            """Those that ask for load do not say goodbye."""

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
def test_in_the_open_loop_all_that_were_due_during_a_stall_have_waited() -> None:
    # 200 a second for two seconds that count, of which a half passes in a stall: 100 of 400 waited 0 to 500 ms.
    with stalling(after=1.0, seconds=0.5) as url:
        found = wrk.open_loop(url, ("one", "/"), 2, rate=200, warmup=0, connections=4)
    assert found.max == pytest.approx(500, abs=60)
    assert found.p90 == pytest.approx(300, abs=60)  # 40 of 400 waited longer
    assert found.p50 < 60


@needs
def test_who_is_too_slow_for_the_rate_has_waits_and_not_noughts() -> None:
    # 50 a second of 1000: after two seconds the requests of the first tenth are sent, which are those of the warm-up.
    with stalling(each=0.02) as url:
        found = wrk.open_loop(url, ("one", "/"), 1, rate=1000, warmup=1, connections=1)
    assert found.p50 > 1500


# ---- peers ----


@needs
def test_every_peer_answers_the_same_body_for_the_same_user(stack: Stack) -> None:
    with folder() as place, ExitStack() as context:
        peers = Peers(stack, place, context)
        ours = requests.get(peers.velikiy.users(1), timeout=5)
        everybody = [peers.velikiy_app, peers.classic, peers.classic_correct, peers.uncached, peers.flask_caching]
        everybody += [peers.fastapi, peers.varnish, peers.stock]
        for peer in everybody:
            for _ in range(2):  # out of its cache as well
                answer = requests.get(peer.users(1), timeout=5)
                assert (peer.name, plain(answer.content)) == (peer.name, plain(ours.content))
        limit = requests.get(peers.limit.users(2), timeout=5)
        assert limit.content == ours.content
        assert set(ours.headers) == set(limit.headers)
        changed = requests.put(peers.fastapi.users(3), json={"name": "Charles"}, timeout=5)
        assert changed.json() == {"message": "Updated"}
    with stack.redis() as server:
        server.flushall()  # the change was not told: peers tell nobody


def plain(body: bytes) -> bytes:
    """With the noughts that PostgreSQL leaves out at the end of a second's fraction, and orjson does not."""
    return re.sub(rb"(\.[0-9]*?)0+\+", rb"\1+", body)


# ---- the end ----


@needs
def test_nothing_is_left_running_after_ctrl_c(tmp_path: Path) -> None:
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
        wait_until(lambda: not any(it.is_running() for it in started), what="the end of all of them")
        assert not marked(mark)
    finally:
        process.kill()
        process.wait()
        for left in marked(mark):
            left.kill()


def marked(mark: str, name: str = "") -> list[psutil.Process]:
    """Processes that were started with this in their environment, and those that these have started; so named."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get("VELIKIY_BENCH_MARK") == mark and name in process.name():
                found.append(process)
    return found
