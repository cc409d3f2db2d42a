"""Run mutants: copies of the code with one bug each. A checker proves something only if it finds these bugs.

    ./run soak --mutants                        all mutants
    ./run soak --mutants no-check silent-relay  these mutants

A mutant leaves out one step of the protocol, or swaps two. The product contains nothing for this purpose: pieces of the
text are replaced in a copy, and a stack is started from the copy. Many of the races are a millisecond wide, so the copy
stalls between two steps now and then, as a process does when it loses its CPU. The controls have all of these stalls and
no bug. As long as they show no wrong read, a wrong read in a mutant is caused by its bug.
"""

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from testkit.stack import ROOT, Stack, folder, running
from tests.consistency.faults import Faults
from tests.consistency.load import Load
from tests.consistency.soak import Soak

MUTANT_S = 60
"""Seconds within which a bug must be found."""

CONTROL_S = 30
"""Seconds within which a control must show no wrong read."""

STOPPED_S = 5.0
"""Seconds for which a cache is stopped: longer than a write waits for its exclusion."""

LOAD = Load(edges=(), users=4, lists=0.3)
"""Few users, so that reads and writes meet."""

SLOW_LOAD = replace(LOAD, users=8, pace=1.0)
"""Writers that pause: the next write to the same user does not hide an entry that an earlier write failed to drop."""

RETURN_LOAD = replace(SLOW_LOAD, pace=0.2, readers=16)
"""Many readers, most of which wait for a Redis that returns."""


class Replacement(NamedTuple):
    file: str
    old: str
    """A text that occurs exactly once in the file, after the replacements that precede this replacement."""
    new: str


class Mutant(NamedTuple):
    name: str
    wrong: str
    replacements: tuple[Replacement, ...]
    faults: frozenset[str] = frozenset()
    load: Load = LOAD
    edge_ttl: int = 60
    """Seconds. It is long for bugs of an edge, which then keeps a wrong entry, and short for bugs of Redis, which edges
    then have to read."""


class PatchDoesNotFit(Exception):
    """The code has changed, and the replacement no longer fits."""


# ---- the stalls ----

PROTOCOL = "velikiy/coherence/protocol.py"
GROUP_COMMIT = "velikiy/coherence/group_commit.py"
EDGE_CLIENT = "velikiy/coherence/edge_client.py"
LEASE = "edge/lua/lease.lua"
RENEWAL = "edge/lua/renewal.lua"
READ = "edge/lua/read.lua"
REDIS = "edge/lua/redis.lua"

# Mostly short and sometimes long: a tenth of the stalls is longer than 130 ms. The expression imports without a name,
# which could hide a name of the module in the function that contains the stall.
STALL = '__import__("time").sleep(0.2 * __import__("random").random() ** 4)'
# For a step that has to meet something rare, such as an edge that returns.
LONG_STALL = '__import__("time").sleep(0.3 * __import__("random").random())'


def after(file: str, line: str, stall: str = STALL) -> Replacement:
    """Add a stall on a new line below this line, which stays as it is and can be replaced further."""
    indent = " " * (len(line) - len(line.lstrip()))
    return Replacement(file, f"{line}\n", f"{line}\n{indent}{stall}\n")


LOCK = "                lock(connection, invalidates, already_locked=() if connection.behind else known_paths)"
BEFORE_DROP = after(PROTOCOL, LOCK, LONG_STALL)
DROP_IN_REDIS = "        leases, redis = self._drop_in_redis(connection, paths, prefill, times)"
DROPPED_IN_REDIS = after(PROTOCOL, DROP_IN_REDIS)
SENT_TO_EDGE = after(EDGE_CLIENT, "        drop.send(until)")
DROPPED_EVERYWHERE = after(
    PROTOCOL, "                lease = self.drop(connection, invalidates, prefill[0] if prefill else None)"
)
PROBE = "checked, before = connection.enqueue(check(path)), connection.exchanges"
PROBED = after(PROTOCOL, f"            {PROBE}", f"connection.query(); {STALL}")
LOADED = after(PROTOCOL, "                entry = load(connection)")
RENEWING = after(
    RENEWAL,
    "        local requested_at = now_ms()  -- before the request: its response may arrive late",
    "ngx.sleep(0.3 * math.random())",
)

REDIS_REPLIED = after(
    READ, "        entry, ttl_s, fill_lease = redis.read(epoch, path)", "ngx.sleep(0.2 * math.random() ^ 4)"
)

READ_EDGES = "edges = self.caches.edges(connection)"

STALLS = (BEFORE_DROP, DROPPED_IN_REDIS, SENT_TO_EDGE, DROPPED_EVERYWHERE, PROBED, LOADED, RENEWING, REDIS_REPLIED)

# Steps that have to meet the return of Redis, seconds after it was stopped. The first reads do not stall, because the
# load waits for them before it starts.
SLOW_REDIS_READ = Replacement(
    REDIS,
    "        local reply, token_or_error = run_script(server, key)\n",
    "        if ngx.shared.state:get('ids') > 50 and math.random() < 0.3 then\n            ngx.sleep(2 + 6 * math.random())\n        end\n"
    "        local reply, token_or_error = run_script(server, key)\n",
)
TWO_SECONDS = '__import__("time").sleep(2)'
REDIS_EMPTIED = after("velikiy/relay/janitor.py", "            shards = self.gate.redis_tier.empty()", TWO_SECONDS)
SLOW_FILL = after(
    PROTOCOL, "                entry = load(connection)", f"if __import__('random').random() < 0.3: {TWO_SECONDS}"
)
RETURN_STALLS = (SLOW_REDIS_READ, REDIS_EMPTIED, SLOW_FILL)

CONTROLS = (
    Mutant("control", "No bug: all stalls.", STALLS, frozenset({"stop-edge", "stop-redis", "sql"})),
    Mutant(
        "control-slow",
        "No bug: all stalls, with writers that pause.",
        STALLS,
        frozenset({"stop-edge", "stop-redis"}),
        load=SLOW_LOAD,
        edge_ttl=1,
    ),
    Mutant(
        "control-redis",
        "No bug: the stalls and the load of the mutants that meet a Redis that returns.",
        RETURN_STALLS,
        frozenset({"stop-redis"}),
        load=RETURN_LOAD,
        edge_ttl=1,
    ),
)

# ---- the bugs ----

BUGS = (
    Mutant(
        "no-check",
        "A reader does not probe for a writer in flight.",
        (
            DROPPED_EVERYWHERE,
            Replacement(PROTOCOL, "written = is_written(checked)", "written = False"),
        ),
    ),
    Mutant(
        "check-after-snapshot",
        "A reader loads first, and probes for a writer in flight afterwards.",
        (
            PROBED,
            DROPPED_EVERYWHERE,
            Replacement(PROTOCOL, PROBE, "loaded, before, checked = load(connection), connection.exchanges, []"),
            Replacement(PROTOCOL, "entry = load(connection)", "entry = loaded"),
            Replacement(PROTOCOL, "written = is_written(checked)", "written = writer_in_flight(connection, path)"),
            Replacement(
                PROTOCOL,
                "import check, is_replicated, is_written, lock, locks\n",
                "import is_replicated, lock, locks, writer_in_flight\n",
            ),
        ),
    ),
    Mutant(
        "lock-after-drop",
        "A writer drops first, and locks afterwards.",
        (
            DROPPED_IN_REDIS,
            DROPPED_EVERYWHERE,
            Replacement(PROTOCOL, "connection.behind = locks(known_paths)", "pass"),
            Replacement(PROTOCOL, f"{LOCK}\n", ""),
            Replacement(
                PROTOCOL,
                DROPPED_EVERYWHERE.new,
                f"{DROPPED_EVERYWHERE.new}                lock(connection, invalidates)\n",
            ),
        ),
    ),
    Mutant(
        "drop-after-commit",
        "A writer commits first, and drops afterwards.",
        (
            SENT_TO_EDGE,
            Replacement(
                PROTOCOL, "lease = self.drop(connection, invalidates, prefill[0] if prefill else None)", "pass"
            ),
            Replacement(
                PROTOCOL,
                "        if prefill and lease:",
                "        if invalidates:\n"
                "            with self.database.autocommit() as connection:\n"
                "                lease = self.drop(connection, invalidates, prefill[0] if prefill else None)\n"
                "        if prefill and lease:",
            ),
        ),
    ),
    Mutant(
        "edges-before-redis",
        "A writer drops at the edges first, and in Redis afterwards.",
        (
            DROPPED_IN_REDIS,
            Replacement(
                PROTOCOL,
                DROP_IN_REDIS,
                f"        at_edges = self._drop_at_edges(connection, paths, times)\n{DROP_IN_REDIS}",
            ),
            Replacement(PROTOCOL, "silent += self._drop_at_edges(connection, paths, times)", "silent += at_edges"),
        ),
    ),
    Mutant(
        "edges-listed-early",
        "A writer reads the list of edges before the drop in Redis, and misses an edge that returns in between.",
        (
            Replacement(PROTOCOL, READ_EDGES, "edges = self.listed"),
            Replacement(
                PROTOCOL,
                DROP_IN_REDIS,
                f"        self.listed = self.caches.edges(connection)\n        {LONG_STALL}\n{DROP_IN_REDIS}",
            ),
        ),
        frozenset({"stop-edge"}),
    ),
    Mutant(
        "result-of-another-round",
        "A writer that arrives during a round gets the result of that round, although the round did not include it.",
        (
            DROPPED_IN_REDIS,
            Replacement(
                GROUP_COMMIT,
                "            return result\n        finally:",
                "            included += self._take(MAX_GROUP_PATHS)\n            return result\n        finally:",
            ),
        ),
    ),
    Mutant(
        "fill-without-lease",
        "Redis stores a fill even if its lease is gone.",
        (
            LOADED,
            Replacement(
                "velikiy/coherence/scripts/fill.lua",
                "if not lease or lease:match('^(%S+) ') ~= ARGV[2] then",
                "if false then",
            ),
        ),
    ),
    Mutant(
        "default-generation",
        "A path without a generation gets a default, under which older entries are found again.",
        (Replacement("edge/lua/generations.lua", "local fresh = ids.fresh()", "local fresh = path"),),
    ),
    Mutant(
        "generation-after-redis",
        "An edge takes a path's generation after the reply of Redis, and stores the entry under it.",
        (
            REDIS_REPLIED,
            Replacement(
                READ,
                "    local stored = generations.store_if_current(path, query, key, entry)\n",
                '    key = (generations.current(epoch, path) or "") .. query\n'
                "    local stored = generations.store_if_current(path, query, key, entry)\n",
            ),
        ),
    ),
    Mutant(
        "lease-check-before-redis",
        "An edge checks its cache lease for Redis before it reads Redis, and not again after the reply.",
        (
            *RETURN_STALLS,
            Replacement(
                REDIS,
                "        if lease.redis(epoch) ~= map then\n            return nil\n        elseif not reply then\n",
                "        if not reply then\n",
            ),
        ),
        frozenset({"stop-redis"}),
        load=RETURN_LOAD,
        edge_ttl=1,
    ),
    Mutant(
        "endless-lease",
        "An edge continues with a lease that has expired.",
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
    Mutant(
        "redis-not-fenced",
        "A drop that Redis does not acknowledge is ignored.",
        (
            Replacement(
                PROTOCOL,
                "        self.caches.fence([redis], counts=is_silent)\n        return {}, redis\n",
                "        return {}, None\n",
            ),
        ),
        frozenset({"stop-redis"}),
        load=SLOW_LOAD,
        edge_ttl=1,
    ),
    Mutant(
        "redis-not-emptied",
        "Redis returns after a fence with its old entries.",
        (
            Replacement(
                "velikiy/relay/janitor.py",
                "            shards = self.gate.redis_tier.empty()\n",
                "            shards = self.gate.redis_tier.identify()\n",
            ),
        ),
        frozenset({"stop-redis"}),
        load=SLOW_LOAD,
        edge_ttl=1,
    ),
    Mutant(
        "silent-relay",
        "SQL from outside is dropped nowhere.",
        (Replacement("velikiy/relay/listener.py", "self._drop(self.paths(payloads))", "pass"),),
        frozenset({"sql"}),
    ),
)

MUTANTS = (*CONTROLS, *BUGS)

KEY_BUGS = (
    Mutant(
        "verdict-without-generation",
        "A worker of an edge remembers a verdict about an API key, whatever happens to the key's generation.",
        (
            Replacement(
                "edge/lua/keys.lua",
                "\n        or not generations.is_current(verdict.epoch_and_path, verdict.generation) then",
                " then",
            ),
        ),
    ),
    Mutant(
        "app-accepts-revoked",
        "An app accepts a key that was revoked.",
        (Replacement("velikiy/http/auth.py", "        if not key.is_valid:\n            return None\n", ""),),
    ),
)
"""Bugs of API keys, which no soak uses: tests/consistency/test_revoked_keys.py has to find them."""


# ---- the run ----


def hunt(names: Sequence[str], seed: int, out: Path) -> int:
    """Run these mutants, or all, and return the exit code.

    After a wrong read in a control the history is saved in `out` and the run ends: such a read is worth more than all
    mutants.
    """
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        print(f"there is no mutant {', '.join(unknown)}; choose from", file=sys.stderr)
        print(", ".join(mutant.name for mutant in MUTANTS), file=sys.stderr)
        return 2
    missed = []
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        print(f"{mutant.name}: {mutant.wrong}", flush=True)
        soak = judge(mutant, seed, out)
        took = f"{soak.seconds:.1f} s, {soak.verdict.reads:,} reads"
        if mutant in CONTROLS and soak.verdict.wrong:
            print(f"{mutant.name}: WRONG READ WITHOUT A BUG after {took}: {soak.verdict.counts(', ')}")
            print("\n".join([*soak.verdict.examples, *(f"history saved: {file}" for file in soak.saved)]))
            return 1
        if mutant in CONTROLS:
            print(f"{mutant.name}: no wrong read in {took}", flush=True)
        elif soak.verdict.wrong:
            print(f"{mutant.name}: found after {took}: {soak.verdict.counts(', ')}", flush=True)
        else:
            print(f"{mutant.name}: NOT FOUND in {took}", flush=True)
            missed.append(mutant.name)
    print(f"not found: {', '.join(missed)}" if missed else "every mutant was found")
    return 1 if missed else 0


def judge(mutant: Mutant, seed: int, out: Path) -> Soak:
    """Run a mutant until its first wrong read."""
    control = mutant in CONTROLS
    with checkout(mutant) as root, started(root, mutant.edge_ttl) as stack:
        database = stack.postgres if "sql" in mutant.faults else ""
        load = replace(mutant.load, edges=tuple(stack.edges), seed=seed, database=database)
        # The stalls delay the relay's drops, too.
        soak = Soak(load, grace=2.0, folder=out if control else None)
        faults = Faults(stack, set(mutant.faults), seed, stopped=STOPPED_S)
        lines = soak.run(CONTROL_S if control else MUTANT_S, faults=faults, every=0.5)
        with contextlib.closing(lines):
            for n, line in enumerate(lines, 1):
                if soak.verdict.wrong:
                    break
                if n % 10 == 0:
                    print(line, flush=True)
    return soak


# ---- copies ----


@contextlib.contextmanager
def checkout(mutant: Mutant) -> Iterator[Path]:
    """Yield a copy of this checkout, uncommitted changes included, with the bug in it."""
    with folder() as directory:
        root = directory / "checkout"
        copy(root)
        mutate(mutant, root)
        yield root


@contextlib.contextmanager
def started(root: Path, edge_ttl: int, **settings: str) -> Iterator[Stack]:
    """Start a stack from this copy.

    The services run from a further copy, which is named by its contents and may be shared. A file with a unique text
    makes its name unique, so that it can be deleted with the rest.
    """
    (root / "velikiy" / "mutant").write_text(str(root))
    environment: Any = {"EDGE_TTL": str(edge_ttl), **settings}
    stack_from_copy = running("--edges", "2", root=root, **environment)
    with contextlib.ExitStack() as afterwards, stack_from_copy as stack:
        script = (stack.data / "run" / "edge1").read_text()
        code = re.findall(r"(/\S+/code-[0-9a-f]+)/edge/start", script)[0]
        afterwards.callback(shutil.rmtree, code, ignore_errors=True)
        yield stack


def copy(root: Path) -> None:
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in listed.split("\0"):
        if not (ROOT / name).is_file():  # the empty name at the end, or a deletion that is not yet committed
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for entry in (root, *root.rglob("*")):  # the services run under another account, whatever the umask is
        entry.chmod(0o755 if entry.is_dir() or entry.stat().st_mode & 0o100 else 0o644)


def mutate(mutant: Mutant, root: Path) -> None:
    """Put the bug of this mutant into the copy `root`.

    Raises:
        PatchDoesNotFit
    """
    for file, old, new in mutant.replacements:
        text = (root / file).read_text()
        if text.count(old) != 1:
            raise PatchDoesNotFit(f"{mutant.name}: this text occurs {text.count(old)} times in {file}:\n{old}")
        (root / file).write_text(text.replace(old, new))
