"""Run pgbench: the rate of PostgreSQL alone, with the same statements."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.measure import Subject
from bench.peers.running import Peers
from bench.wrk import LoadResult
from velikiy.stack.cluster import binaries

STATEMENTS = {
    "select": "SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = :id;",
    "update": "UPDATE users SET name = 'Bench ' || :id WHERE id = :id RETURNING id;",
}


def subject(peers: Peers, kind: str, users: int) -> Subject:
    def run(seconds: int) -> LoadResult:
        with TemporaryDirectory() as directory:
            script = Path(directory) / "script.sql"
            script.write_text(f"\\set id random(1, {users})\n{STATEMENTS[kind]}\n")
            program = str(binaries(Path("none")) / "pgbench")
            command = [program, "--client=16", "--jobs=2", "--no-vacuum", "--protocol=prepared", f"--time={seconds}"]
            done = subprocess.run(
                [*command, f"--file={script}", peers.database],
                capture_output=True,
                text=True,
                check=True,
                timeout=60 + seconds,
            )
        return parse(done.stdout, seconds)

    return Subject(f"pgbench {kind}", run, {"postgres": peers.shared["postgres"]})


def parse(text: str, seconds: float) -> LoadResult:
    transactions = int(_find(r"actually processed: (\d+)", text))
    if not transactions:
        raise RuntimeError(f"pgbench ran no transaction in {seconds:g} s: the machine is too busy for a benchmark")
    average_ms = float(_find(r"latency average = ([\d.]+) ms", text))
    # pgbench prints averages only.
    return LoadResult(transactions, seconds, 0, average_ms, average_ms, average_ms, average_ms, average_ms)


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if not match:
        raise ValueError(f"the output of pgbench contains no {pattern!r}: {text}")
    return match[1]
