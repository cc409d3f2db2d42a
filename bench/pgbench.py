"""pgbench: what PostgreSQL alone does of the same statements."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.measure import Contestant
from bench.peers.running import Peers
from bench.wrk import Answered
from velikiy.stack.cluster import binaries

STATEMENTS = {
    "select": "SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = :id;",
    "update": "UPDATE users SET name = 'Bench ' || :id WHERE id = :id RETURNING id;",
}


def contestant(peers: Peers, kind: str, users: int) -> Contestant:
    def load(seconds: int) -> Answered:
        with TemporaryDirectory() as place:
            script = Path(place) / "script.sql"
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
        return parsed(done.stdout, seconds)

    return Contestant(f"pgbench {kind}", load, {"postgres": peers.shared["postgres"]})


def parsed(text: str, seconds: float) -> Answered:
    done = int(found(r"actually processed: (\d+)", text))
    average = float(found(r"latency average = ([\d.]+) ms", text))
    # It prints averages only.
    return Answered(done, seconds, 0, average, average, average, average, average)


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if not match:
        raise ValueError(f"pgbench said nothing like {pattern}: {text}")
    return match[1]
