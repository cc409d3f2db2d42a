"""Bugs, planted into a copy of the code, and whether the checker finds them: what it never finds it need not praise.

    ./run soak --planted                      all of them
    ./run soak --planted no-check deaf-relay  these

Each is one step left out of the protocol, or two of them exchanged. The product knows nothing of them: pieces of its
text are replaced in a copy, and a stack is started from that. Many of these races are a millisecond wide, so the copy
stalls between two steps now and then, as a process does that loses its processor. The controls have all of these
stalls and no bug: with nothing wrong there, what is wrong elsewhere is the bug's.
"""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from testkit.stack import ROOT, Stack, folder, running
from tests.consistency.checker import Verdict
from tests.consistency.faults import Faults
from tests.consistency.load import Load
from tests.consistency.soak import Soak

PATIENCE = 60
"""Seconds in which a bug has to be found."""

QUIET = 30
"""Seconds in which nothing may be found without one."""

STOPPED = 5.0
"""Seconds that a cache is kept from running: longer than a write waits until it is out of use."""

LOAD = Load(edges=(), users=4, lists=0.3)
"""Few users, so that reads and writes meet."""

SLOW = replace(LOAD, users=8, pace=1.0)
"""What was written while a cache was away is not mended by the next write to the same user."""

BACK = replace(SLOW, pace=0.2, readers=16)
"""Most of its readers wait."""


class Replacement(NamedTuple):
    file: str
    old: str
    """Occurs there exactly once, after the replacements before this one."""
    new: str


class Planted(NamedTuple):
    name: str
    wrong: str
    replacements: tuple[Replacement, ...]
    faults: frozenset[str] = frozenset()
    load: Load = LOAD
    edge_ttl: int = 60
    """Seconds. Where an edge has the bug, what is wrong stays to be found; where Redis has it, edges have to ask it."""


class Moved(Exception):
    """The code has moved on, and the patch has not."""


# ---- the stalls ----

FENCE = "velikiy/coherence/protocol.py"
GROUP = "velikiy/coherence/group_commit.py"
TIER = "velikiy/coherence/edge_client.py"
LEASE = "edge/lua/lease.lua"
RENEWAL = "edge/lua/renewal.lua"
READ = "edge/lua/read.lua"
REDIS = "edge/lua/redis.lua"

# Mostly short and sometimes long: a tenth of them is longer than 130 ms.
# Without a name of its own, which would hide the module's in the function that it is put into.
STALL = '__import__("time").sleep(0.2 * __import__("random").random() ** 4)'
# For what has to meet something rare, such as an edge that comes back.
LONG_STALL = '__import__("time").sleep(0.3 * __import__("random").random())'


def after(file: str, line: str, stall: str = STALL) -> Replacement:
    """A stall on a line of its own below this one, which stays as it is and can be replaced further."""
    indent = " " * (len(line) - len(line.lstrip()))
    return Replacement(file, f"{line}\n", f"{line}\n{indent}{stall}\n")


LOCK = "                lock(connection, invalidates, already_locked=lock_first)"
BEFORE_DROP = after(FENCE, LOCK, LONG_STALL)
IN_REDIS = after(FENCE, "                    leases = self.redis_tier.drop(paths, prefill)")
AT_EDGE = after(TIER, "        drop.send(until)")
DROPPED = after(FENCE, "                lease = self.drop(connection, invalidates, prefill[0] if prefill else None)")
CHECKED = after(FENCE, "            checked = connection.enqueue(check(path))", f"connection.query(); {STALL}")
LOADED = after(FENCE, "            entry = load(connection)")
RENEWING = after(
    RENEWAL,
    "        local requested_at = now_ms()  -- before the request: its response may arrive late",
    "ngx.sleep(0.3 * math.random())",
)

HEARD = after(READ, "        entry, ttl_s, fill_lease = redis.read(epoch, path)", "ngx.sleep(0.2 * math.random() ^ 4)")

# What is done before the drop in Redis, and after it.
DOUBT = "        redis = self.caches.redis(connection) if self.redis_tier.may_be_fenced else None\n"
LIST = "edges = self.caches.edges(connection)"

STALLS = (BEFORE_DROP, IN_REDIS, AT_EDGE, DROPPED, CHECKED, LOADED, RENEWING, HEARD)

# What has to meet the moment at which Redis comes back, seconds after it was stopped. Not the first reads: the load
# waits for those before it begins.
ASKING = Replacement(
    REDIS,
    "        local reply, token_or_error = run_script(key)\n",
    "        if ngx.shared.state:get('ids') > 50 and math.random() < 0.3 then\n            ngx.sleep(2 + 6 * math.random())\n        end\n"
    "        local reply, token_or_error = run_script(key)\n",
)
TWO_SECONDS = '__import__("time").sleep(2)'
EMPTIED = after("velikiy/relay/janitor.py", "            self.gate.redis_tier.drop(None)", TWO_SECONDS)
SLOW_FILL = after(
    FENCE, "            entry = load(connection)", f"if __import__('random').random() < 0.3: {TWO_SECONDS}"
)
RETURNING = (ASKING, EMPTIED, SLOW_FILL)

CONTROLS = (
    Planted("control", "Nothing: all the stalls, and no bug.", STALLS, frozenset({"stop-edge", "stop-redis", "sql"})),
    Planted(
        "control-slow",
        "Nothing; as the slow ones run.",
        STALLS,
        frozenset({"stop-edge", "stop-redis"}),
        load=SLOW,
        edge_ttl=1,
    ),
    Planted(
        "control-redis",
        "Nothing; as those run that meet a Redis which comes back.",
        RETURNING,
        frozenset({"stop-redis"}),
        load=BACK,
        edge_ttl=1,
    ),
)

# ---- the bugs ----

BUGS = (
    Planted(
        "no-check",
        "A reader does not ask whether a writer is in flight.",
        (
            DROPPED,
            Replacement(FENCE, "written = is_written(checked)", "written = False"),
        ),
    ),
    Planted(
        "check-after-snapshot",
        "A reader loads first, and asks then whether a writer was in flight.",
        (
            CHECKED,
            DROPPED,
            Replacement(FENCE, "checked = connection.enqueue(check(path))", "loaded = load(connection)"),
            Replacement(FENCE, "entry = load(connection)", "entry = loaded"),
            Replacement(FENCE, "written = is_written(checked)", "written = writer_in_flight(connection, path)"),
            Replacement(FENCE, "import check, is_written, lock, locks\n", "import lock, locks, writer_in_flight\n"),
        ),
    ),
    Planted(
        "lock-after-drop",
        "A writer drops first, and locks then.",
        (
            IN_REDIS,
            DROPPED,
            Replacement(FENCE, "locks(lock_first)", "()"),
            Replacement(FENCE, f"{LOCK}\n", ""),
            Replacement(FENCE, DROPPED.new, f"{DROPPED.new}                lock(connection, invalidates)\n"),
        ),
    ),
    Planted(
        "drop-after-commit",
        "A writer commits first, and drops then.",
        (
            AT_EDGE,
            Replacement(FENCE, "lease = self.drop(connection, invalidates, prefill[0] if prefill else None)", "pass"),
            Replacement(
                FENCE,
                "        if prefill and lease:",
                "        if invalidates:\n"
                "            with self.database.autocommit() as connection:\n"
                "                lease = self.drop(connection, invalidates, prefill[0] if prefill else None)\n"
                "        if prefill and lease:",
            ),
        ),
    ),
    Planted(
        "edges-before-redis",
        "A writer drops at the edges first, and in Redis then.",
        (
            IN_REDIS,
            Replacement(FENCE, DOUBT, f"        at_edges = self._drop_at_edges(connection, paths)\n{DOUBT}"),
            Replacement(FENCE, "fenced + self._drop_at_edges(connection, paths)", "fenced + at_edges"),
        ),
    ),
    Planted(
        "edges-listed-early",
        "A writer asks which edges there are before the drop in Redis: one that comes back meanwhile is not told.",
        (
            Replacement(FENCE, LIST, "edges = self.listed"),
            Replacement(
                FENCE, DOUBT, f"        self.listed = self.caches.edges(connection)\n        {LONG_STALL}\n{DOUBT}"
            ),
        ),
        frozenset({"stop-edge"}),
    ),
    Planted(
        "told-what-was-not-asked",
        "A writer who comes while one is under way is told what that one hears, as if it had been taken along.",
        (
            IN_REDIS,
            Replacement(
                GROUP,
                "            return result\n        finally:",
                "            included += self._take(MAX_GROUP_PATHS)\n            return result\n        finally:",
            ),
        ),
    ),
    Planted(
        "fill-without-lease",
        "Redis stores a fill whatever became of its lease.",
        (
            LOADED,
            Replacement(
                "velikiy/coherence/scripts/fill.lua",
                "if not lease or lease:match('^(%S+) ') ~= ARGV[2] then",
                "if false then",
            ),
        ),
    ),
    Planted(
        "default-generation",
        "A path without a generation gets a default, and with it what was stored under that before.",
        (Replacement("edge/lua/generations.lua", "local fresh = ids.fresh()", "local fresh = path"),),
    ),
    Planted(
        "generation-after-redis",
        "An edge asks for a path's generation once Redis has answered, and stores the answer under that.",
        (
            HEARD,
            Replacement(
                READ,
                "    local stored = store_if_current(path, query, key, entry)\n",
                '    key = (generations.current(epoch, path) or "") .. query\n'
                "    local stored = store_if_current(path, query, key, entry)\n",
            ),
        ),
    ),
    Planted(
        "trust-before-redis",
        "An edge looks whether Redis may be used before it asks, and not once more when Redis has answered.",
        (
            *RETURNING,
            Replacement(
                REDIS,
                "        if not lease.trusts_redis(epoch) then\n            return nil\n        elseif not reply then\n",
                "        if not reply then\n",
            ),
        ),
        frozenset({"stop-redis"}),
        load=BACK,
        edge_ttl=1,
    ),
    Planted(
        "endless-lease",
        "An edge goes on with a lease that has run out.",
        (
            RENEWING,
            Replacement(
                LEASE,
                "if valid_until and now_ms() < valid_until and not exiting() then",
                "if valid_until and not exiting() then",
            ),
        ),
        frozenset({"stop-edge"}),
    ),
    Planted(
        "redis-not-fenced",
        "A drop that Redis did not answer is passed over.",
        (
            Replacement(
                FENCE,
                "                redis = self.caches.redis(connection)\n                self.caches.fence([redis])\n",
                "                redis = None\n",
            ),
        ),
        frozenset({"stop-redis"}),
        load=SLOW,
        edge_ttl=1,
    ),
    Planted(
        "redis-not-emptied",
        "Redis comes back after a fence with what it held.",
        (
            Replacement(
                "velikiy/relay/janitor.py",
                "            self.gate.redis_tier.drop(None)\n",
                "            if not self.gate.redis_tier.answers():\n                return\n",
            ),
        ),
        frozenset({"stop-redis"}),
        load=SLOW,
        edge_ttl=1,
    ),
    Planted(
        "deaf-relay",
        "What is written past the app is dropped nowhere.",
        (Replacement("velikiy/relay/listener.py", "self._drop(self.paths(payloads))", "pass"),),
        frozenset({"sql"}),
    ),
)

PLANTED = (*CONTROLS, *BUGS)


# ---- finding them ----


def hunt(names: Sequence[str], seed: int, out: Path) -> int:
    """These, or where none is named all of them; the exit code. Of a wrong read without a bug the history goes to
    `out`, and nothing else is tried: it is worth more than all the rest."""
    if unknown := set(names) - {planted.name for planted in PLANTED}:
        print(f"there is no {', '.join(unknown)}; there are {', '.join(planted.name for planted in PLANTED)}")
        return 2
    missed = []
    for planted in PLANTED:
        if names and planted.name not in names:
            continue
        print(f"{planted.name}: {planted.wrong}", flush=True)
        soak = judge(planted, seed, out)
        took = f"{soak.seconds:.1f} s, {soak.verdict.reads:,} reads"
        if planted in CONTROLS and soak.verdict.wrong:
            print(f"{planted.name}: WRONG WITHOUT A BUG after {took}: {found(soak.verdict)}")
            print("\n".join([*soak.verdict.examples, *(f"saved: {file}" for file in soak.saved)]))
            return 1
        if planted in CONTROLS:
            print(f"{planted.name}: nothing wrong in {took}", flush=True)
        elif soak.verdict.wrong:
            print(f"{planted.name}: caught after {took}: {found(soak.verdict)}", flush=True)
        else:
            print(f"{planted.name}: NOT CAUGHT in {took}", flush=True)
            missed.append(planted.name)
    print(f"NOT CAUGHT: {', '.join(missed)}" if missed else "each planted bug was caught")
    return 1 if missed else 0


def judge(planted: Planted, seed: int, out: Path) -> Soak:
    """A run until its first wrong read."""
    control = planted in CONTROLS
    with checkout(planted) as root, started(root, planted.edge_ttl) as stack:
        database = stack.postgres if "sql" in planted.faults else ""
        load = replace(planted.load, edges=tuple(stack.edges), seed=seed, database=database)
        # The stalls are in the relay's drops too.
        soak = Soak(load, grace=2.0, folder=out if control else None)
        faults = Faults(stack, set(planted.faults), seed, stopped=STOPPED)
        lines = soak.run(QUIET if control else PATIENCE, faults=faults, every=0.5)
        with contextlib.closing(lines):
            for n, line in enumerate(lines, 1):
                if soak.verdict.wrong:
                    break
                if n % 10 == 0:
                    print(line, flush=True)
    return soak


def found(verdict: Verdict) -> str:
    counts = {kind: getattr(verdict, kind) for kind in ("stale", "backwards", "impossible", "mixed")}
    return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


# ---- copies ----


@contextlib.contextmanager
def checkout(planted: Planted) -> Iterator[Path]:
    """A copy of this one, uncommitted changes included, with the bug in it."""
    with folder() as place:
        root = place / "checkout"
        copy(root)
        plant(planted, root)
        yield root


@contextlib.contextmanager
def started(root: Path, edge_ttl: int) -> Iterator[Stack]:
    """From this copy. The services run from one more, which is named by its contents and may be shared: these are made
    unique, so that it can be deleted with the rest."""
    (root / "velikiy" / "planted").write_text(str(root))
    with contextlib.ExitStack() as afterwards, running("--edges", "2", root=root, EDGE_TTL=str(edge_ttl)) as stack:
        configured = (stack.data / "run" / "supervisord.conf").read_text()
        code = re.findall(r"(\S+/code-[0-9a-f]+)/edge/start", configured)[0]
        afterwards.callback(shutil.rmtree, code, ignore_errors=True)
        yield stack


def copy(root: Path) -> None:
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in listed.split("\0"):
        if not (ROOT / name).is_file():  # the end of the list; or deleted, and not yet committed
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for entry in (root, *root.rglob("*")):  # the services run as somebody else, whatever our umask is
        entry.chmod(0o755 if entry.is_dir() or entry.stat().st_mode & 0o100 else 0o644)


def plant(planted: Planted, root: Path) -> None:
    """
    Raises:
        Moved
    """
    for file, old, new in planted.replacements:
        text = (root / file).read_text()
        if text.count(old) != 1:
            raise Moved(f"{planted.name}: this occurs {text.count(old)} times in {file}, and not once:\n{old}")
        (root / file).write_text(text.replace(old, new))
