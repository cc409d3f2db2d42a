"""The checker rejects histories that are known to be wrong, accepts histories that are right, and agrees with a search
through all orders on histories that are small enough for one."""

import random
from collections import deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.consistency import checker as checker_module
from tests.consistency import floors
from tests.consistency.checker import WRONG_KINDS, Checker, Verdict, check, title
from tests.consistency.history import FOREVER, OUTSIDE, Operation, Row, load, save

GONE = ()
"""The rows of a read of a user who does not exist."""


def ms(time: float) -> int:
    return int(time * 1_000_000)


def create(user: int, begin: float, end: float, name: str = "", outcome: str = "ok") -> Operation:
    known = None if outcome == "unknown" else user
    name = name or f"{user}.1"
    return Operation(ms(begin), ms(end), "create", "/users", outcome, user=known, name=name)  # type: ignore[arg-type]


def update(user: int, name: str, begin: float, end: float, outcome: str = "ok", edge: str = "") -> Operation:
    path = f"/users/{user}"
    return Operation(ms(begin), ms(end), "update", path, outcome, edge=edge, user=user, name=name)  # type: ignore[arg-type]


def delete(user: int, begin: float, end: float, outcome: str = "ok") -> Operation:
    return Operation(ms(begin), ms(end), "delete", f"/users/{user}", outcome, user=user)  # type: ignore[arg-type]


def read(
    user: int, shows: tuple[int, str] | tuple[()], begin: float, end: float, edge: str = "edge1", tier: str = "HIT"
) -> Operation:
    rows = (Row(user, *shows),) if shows else ()
    return Operation(ms(begin), ms(end), "read", f"/users/{user}", "ok", edge=edge, tier=tier, user=user, rows=rows)


def listing(
    rows: dict[int, tuple[int, str]], begin: float, end: float, after: int = 0, until: int | None = None
) -> Operation:
    shown = tuple(Row(user, *row) for user, row in rows.items())
    return Operation(ms(begin), ms(end), "list", "/users", "ok", edge="edge1", rows=shown, after=after, until=until)


def counts(verdict: Verdict) -> tuple[int, int, int, int]:
    return verdict.stale, verdict.non_monotonic, verdict.impossible, verdict.mixed


BORN = create(7, 0, 1)
V1 = (1, "7.1")
V2 = (2, "b")
V3 = (3, "c")

BAD = {
    "stale after an acknowledged write": (
        "stale",
        [BORN, update(7, "b", 2, 3), read(7, V1, 4, 5)],
    ),
    "stale after an acknowledged write that no read has shown": (
        "stale",
        [BORN, update(7, "b", 2, 3), update(7, "c", 4, 5), read(7, V2, 6, 7)],
    ),
    "stale, if two writers took versions that no read has shown": (
        "stale",
        [BORN, update(7, "b", 2, 6), update(7, "c", 3, 5), update(7, "d", 7, 8), read(7, (3, "c"), 9, 10)],
    ),
    "stale, with the right version of the wrong writer": (
        "stale",
        [BORN, update(7, "b", 2, 3, "unknown"), update(7, "c", 4, 5), read(7, V2, 6, 7)],
    ),
    "404 after the creation was acknowledged": ("stale", [BORN, read(7, GONE, 2, 3)]),
    "a row after its deletion was acknowledged": ("stale", [BORN, delete(7, 2, 3), read(7, V1, 4, 5)]),
    "a list without a user whose creation was acknowledged": ("stale", [BORN, listing({}, 2, 3)]),
    "a list with a user who is gone": ("stale", [BORN, delete(7, 2, 3), listing({7: V1}, 4, 5)]),
    "a page that leaves a user out": (
        "stale",
        [BORN, create(9, 0, 1), listing({9: (1, "9.1")}, 2, 3, after=3, until=9)],
    ),
    "non-monotonic across two edges": (
        "non_monotonic",
        [BORN, update(7, "b", 2, 9), read(7, V2, 3, 4, "edge1"), read(7, V1, 5, 6, "edge2")],
    ),
    "an unknown write that is seen and then unseen": (
        "non_monotonic",
        [BORN, update(7, "b", 2, 3, "unknown"), read(7, V2, 4, 5), read(7, V1, 6, 7)],
    ),
    "an unknown deletion that is seen and then unseen": (
        "non_monotonic",
        [BORN, delete(7, 2, 3, "unknown"), read(7, GONE, 4, 5), read(7, V1, 6, 7)],
    ),
    "an unknown creation that is seen and then unseen": (
        "non_monotonic",
        [create(7, 0, 1, outcome="unknown"), read(7, V1, 2, 3), read(7, GONE, 4, 5)],
    ),
    "a deletion that a writer saw, and a row after it": (
        "non_monotonic",
        [
            BORN,
            delete(7, 2, 3, "unknown"),
            update(7, "b", 4, 5, "failed")._replace(status=404),
            read(7, V1, 6, 7),
        ],
    ),
    "two lists, the later one older": (
        "non_monotonic",
        [BORN, update(7, "b", 2, 9), listing({7: V2}, 3, 4), listing({7: V1}, 5, 6)],
    ),
    "a failed write that is seen": ("impossible", [BORN, update(7, "b", 2, 3, "failed"), read(7, V2, 4, 5)]),
    "a value that was never written": ("impossible", [BORN, read(7, (2, "z"), 2, 3)]),
    "a user that was never written": ("impossible", [BORN, listing({7: V1, 8: (1, "8.1")}, 2, 3)]),
    "a value of another user": ("impossible", [BORN, create(8, 0, 1), read(7, (1, "8.1"), 2, 3)]),
    "a value from the future": ("impossible", [BORN, read(7, V2, 2, 3), update(7, "b", 4, 5)]),
    "more versions than writes": ("impossible", [BORN, update(7, "b", 2, 3), read(7, (3, "b"), 4, 5)]),
    "a write that took effect twice": (
        "impossible",
        [BORN, update(7, "b", 2, 3), update(7, "c", 2, 9), read(7, V2, 4, 5), read(7, (3, "b"), 6, 7)],
    ),
    "two writes with one version": (
        "impossible",
        [BORN, update(7, "b", 2, 9), update(7, "c", 2, 9), read(7, V2, 4, 6), read(7, (2, "c"), 4, 6)],
    ),
    "a write to a user who had been gone": (
        "impossible",
        [BORN, delete(7, 2, 9), read(7, GONE, 3, 4), update(7, "b", 5, 6)],
    ),
    "a list that mixes two moments": (
        "mixed",
        [
            *[BORN, create(8, 0, 1)],
            *[update(7, "b", 2, 3), update(8, "8.2", 4, 5)],
            listing({7: V1, 8: (2, "8.2")}, 1.5, 6),
        ],
    ),
    "a list with a new user and without a change from before": (
        "mixed",
        [BORN, update(7, "b", 2, 3), create(8, 4, 5), listing({7: V1, 8: (1, "8.1")}, 1.5, 6)],
    ),
    "a list without a new user and with a change from after": (
        "mixed",
        [BORN, create(8, 2, 3), update(7, "b", 4, 5), listing({7: V2}, 1.5, 6)],
    ),
    "two lists at the same time that no order explains": (
        "mixed",
        [
            *[BORN, create(8, 0, 1)],
            *[update(7, "b", 2, 9), update(8, "8.2", 2, 9)],
            *[listing({7: V2, 8: (1, "8.1")}, 3, 8), listing({7: V1, 8: (2, "8.2")}, 3, 8)],
        ],
    ),
}

GOOD = {
    "a read at the same time as a write, before it": [BORN, update(7, "b", 2, 5), read(7, V1, 3, 4)],
    "a read at the same time as a write, after it": [BORN, update(7, "b", 2, 5), read(7, V2, 3, 4)],
    "two reads at the same time, in either order": [
        *[BORN, update(7, "b", 2, 9)],
        *[read(7, V2, 3, 6, "edge1"), read(7, V1, 4, 5, "edge2")],
    ],
    "touching intervals are concurrent": [BORN, update(7, "b", 2, 3), read(7, V1, 3, 4)],
    "an unknown write that is never seen": [
        *[BORN, update(7, "b", 2, 3, "unknown")],
        *[read(7, V1, 4, 5), update(7, "c", 6, 7), read(7, (2, "c"), 8, 9)],
    ],
    "an unknown write that is seen late, and stays": [
        *[BORN, update(7, "b", 2, 3, "unknown"), read(7, V1, 4, 5)],
        *[read(7, V1, 900, 901), read(7, V2, 1000, 1001), read(7, V2, 1002, 1003)],
    ],
    "an unknown write that comes after later ones": [
        *[BORN, update(7, "b", 2, 3, "unknown"), update(7, "c", 4, 5), read(7, (2, "c"), 6, 7)],
        *[read(7, (3, "b"), 8, 9), update(7, "d", 10, 11), read(7, (4, "d"), 12, 13)],
    ],
    "writers at the same time, in either order": [
        *[BORN, update(7, "b", 2, 6), update(7, "c", 3, 5)],
        *[read(7, (2, "c"), 4, 5), read(7, (3, "b"), 7, 8)],
    ],
    "a failed write": [BORN, update(7, "b", 2, 3, "failed"), read(7, V1, 4, 5), listing({7: V1}, 6, 7)],
    "a whole life": [
        *[read(7, GONE, -2, -1), BORN, read(7, V1, 2, 3), delete(7, 4, 7), read(7, V1, 5, 6)],
        *[read(7, GONE, 5.1, 6.1), read(7, GONE, 8, 9), listing({}, 8, 9)],
    ],
    "a creation that was read before it was acknowledged": [create(7, 0, 9), read(7, V1, 2, 3), read(7, V1, 4, 5)],
    "an unknown creation that shows up": [
        create(7, 0, 1, outcome="unknown"),
        read(7, GONE, 2, 3),
        listing({7: V1}, 4, 5),
    ],
    "different paths": [BORN, update(7, "b", 2, 9), read(7, V2, 3, 4), listing({7: V1}, 5, 6), read(7, V2, 7, 8)],
    "a page that does not cover a user": [
        *[BORN, create(9, 0, 1), update(9, "9.2", 2, 3)],
        *[listing({7: V1}, 4, 5, until=7), listing({9: (2, "9.2")}, 4, 5, after=7)],
    ],
    "a list taken between two writes": [
        *[BORN, create(8, 0, 1), update(7, "b", 2, 3), update(8, "8.2", 4, 5)],
        listing({7: V2, 8: (1, "8.1")}, 1.5, 6),
    ],
    "users that come and go during a list": [
        *[BORN, create(8, 2, 3), delete(8, 4, 5), update(7, "b", 6, 7), listing({7: V2}, 1.5, 8)],
    ],
    "a read that the edge marks STALE": [BORN, update(7, "b", 2, 3), read(7, V1, 4, 5, tier="STALE")],
    "reads soon after SQL from outside": [
        *[BORN, update(7, "b", 2, 3, edge=OUTSIDE)],
        *[read(7, V2, 4, 5), read(7, V1, 6, 7), listing({7: V1}, 8, 9), read(7, V2, 1004, 1005)],
    ],
    "errors": [
        *[BORN, update(7, "b", 2, 3)],
        Operation(ms(4), ms(5), "read", "/users/7", "failed", status=503, user=7),
    ],
}


@pytest.mark.parametrize("name", BAD)
def test_checker_rejects_wrong_history(name: str) -> None:
    kind, history = BAD[name]
    verdict = check(history)
    assert counts(verdict) == tuple(int(kind == k) for k in WRONG_KINDS), verdict
    assert verdict.examples[0].startswith(f"{title(kind)}: ")
    assert check(history[::-1]).wrong == 1  # in whatever order the processes report


@pytest.mark.parametrize("name", GOOD)
def test_checker_accepts_right_history(name: str) -> None:
    for order in (GOOD[name], GOOD[name][::-1]):
        assert check(order).wrong == 0, check(order)


def test_reads_after_sql_from_outside_are_judged_once_the_grace_is_over() -> None:
    history = [BORN, update(7, "b", 2, 3, edge=OUTSIDE), read(7, V1, 1004, 1005)]
    assert counts(check(history)) == (1, 0, 0, 0)
    assert counts(check(history, grace=2)) == (0, 0, 0, 0)


def test_paths_are_judged_as_one_path_if_across_is_set() -> None:
    history = GOOD["different paths"]
    assert counts(check(history, across=True)) == (0, 1, 0, 0)


def test_example_describes_the_wrong_read_and_its_evidence() -> None:
    (example,) = check([BORN, update(7, "b", 2, 3), read(7, V1, 4, 5)]).examples
    assert example == (
        "stale: GET /users/7 (edge1 HIT, 0.004000 to 0.005000 s) showed version 1 '7.1' of user 7, but version 2 or "
        "later was current, because of PUT /users/7 'b' (-, 0.002000 to 0.003000 s)"
    )


# ---- against a search through all orders ----


State = dict[int, tuple[int, str]]
"""The version and the name of each user that has existed; the version of a deleted user is -1."""


def has_valid_order(history: list[Operation]) -> bool:
    """Try every order: exponential, and too simple to be wrong.

    The order may leave out a write that may not have happened.
    """
    operations = [o for o in history if o.happened]
    failed: set[tuple[frozenset[int], frozenset[tuple[int, tuple[int, str]]]]] = set()

    def search(left: frozenset[int], state: State) -> bool:
        if all(operations[n].outcome == "unknown" for n in left):
            return True
        here = (left, frozenset(state.items()))
        if here in failed:
            return False
        # An operation cannot come next if another remaining operation had returned before its invocation.
        horizon = min(operations[n].returned for n in left if operations[n].outcome == "ok")
        for n in left:
            if operations[n].invoke > horizon:
                continue
            after = applied(operations[n], state)
            if after is not None and search(left - {n}, after):
                return True
        failed.add(here)
        return False

    return search(frozenset(range(len(operations))), {})


def applied(operation: Operation, state: State) -> State | None:
    """Return the state after the operation; None if the operation cannot come next."""
    there = {user: row for user, row in state.items() if row[0] > 0}
    if operation.kind == "list":
        return state if {row.user: (row.version, row.name) for row in operation.rows} == there else None
    assert operation.user is not None
    user = operation.user
    if operation.kind == "read":
        shown = (operation.rows[0].version, operation.rows[0].name) if operation.rows else None
        return state if there.get(user) == shown else None
    if operation.kind == "create":
        return {**state, user: (1, operation.name)} if user not in state else None
    if user not in there:
        return None
    if operation.kind == "delete":
        return {**state, user: (-1, "")}
    return {**state, user: (there[user][0] + 1, operation.name)}


def simulated(
    source: random.Random, operations: int, users: int = 1, deletions: float = 0.03, lists: bool = False
) -> Iterator[Operation]:
    """Yield a history that is linearizable by construction: each operation takes effect at some moment within its
    interval; an unknown operation takes effect at any time after its invocation, or never. The reads are of single users,
    or of lists."""
    names = count(1)
    moments: list[tuple[float, Operation]] = []
    born: dict[int, float] = {}
    for user in range(1, users + 1):
        begin = source.uniform(0, 3)
        born[user] = begin + source.uniform(1, 6)
        moments.append((source.uniform(begin, born[user]), create(user, begin, born[user])))
    for n in range(operations):
        user = source.randint(1, users)
        begin = source.uniform(0, operations * 1.2)
        end = begin + source.expovariate(0.3)
        kind = source.random()
        if kind < 0.65:
            one = listing({}, begin, end) if lists else read(user, GONE, begin, end, f"edge{n % 2}")
            moments.append((source.uniform(begin, end), one))
            continue
        begin, end = begin + born[user], end + born[user]
        outcome = source.choice(["ok", "ok", "ok", "unknown", "failed"])
        effect = source.uniform(begin, end) if outcome == "ok" else begin + source.expovariate(0.05)
        if kind > 1 - deletions:
            moments.append((effect, delete(user, begin, end, outcome)))
        else:
            moments.append((effect, update(user, f"w{next(names)}", begin, end, outcome)))
    state: State = {}
    for _, operation in sorted(moments, key=lambda m: m[0]):
        if operation.kind in ("read", "list"):
            rows = tuple(Row(user, *row) for user, row in sorted(state.items()) if row[0] > 0)
            yield operation._replace(rows=tuple(row for row in rows if operation.user in (None, row.user)))
            continue
        after = applied(operation, state)
        if after is None and operation.outcome == "ok":
            yield operation._replace(outcome="failed", status=404)
            continue
        yield operation
        lost = operation.outcome == "unknown" and source.random() < 0.4
        if after is not None and operation.happened and not lost:
            state = after


def spoilt(source: random.Random, history: list[Operation]) -> list[Operation] | None:
    """Return the history with the row of one user in one read replaced by the row of another read; None without two
    suitable reads."""
    reads = [n for n, o in enumerate(history) if o.kind in ("read", "list")]
    if len(reads) < 2:
        return None
    n, other = source.choice(reads), source.choice(reads)
    one, two = history[n], history[other]
    if one.user != two.user:
        return None
    user = one.user or source.choice([row.user for row in (*one.rows, *two.rows)] or [1])
    rows = {row.user: row for row in one.rows if row.user != user} | {
        row.user: row for row in two.rows if row.user == user
    }
    bad = one._replace(rows=tuple(row for _, row in sorted(rows.items())))
    return None if bad == one else [*history[:n], bad, *history[n + 1 :]]


def without_404s_of_writers(history: list[Operation]) -> list[Operation]:
    return [o for o in history if o.status != 404]


@pytest.mark.parametrize("seed", range(20))
def test_checker_accepts_simulated_histories(seed: int) -> None:
    source = random.Random(seed)
    for size in (10, 100, 1000):
        for lists in (False, True):
            verdict = check(simulated(source, size, users=1 + seed % 4, lists=lists))
            assert verdict.wrong == 0, verdict


@pytest.mark.parametrize("seed", range(20))
def test_checker_agrees_with_a_search_through_all_orders(seed: int) -> None:
    source = random.Random(seed)
    rejected = 0
    for _ in range(100):
        history = without_404s_of_writers(list(simulated(source, source.randint(4, 14))))
        assert has_valid_order(history)
        assert check(history).wrong == 0, check(history)
        rejected += rejected_once_spoilt(source, history)
    assert rejected > 10


def rejected_once_spoilt(source: random.Random, history: list[Operation]) -> bool:
    """Return whether search and checker both reject the spoilt history; False also if no read could be spoilt."""
    bad = spoilt(source, history)
    if bad is None:
        return False
    right = has_valid_order(bad)
    assert right == (check(bad).wrong == 0), (bad, str(check(bad)))
    return not right


@pytest.mark.parametrize("seed", range(20))
def test_checker_agrees_with_a_search_through_all_orders_of_lists(seed: int) -> None:
    source = random.Random(seed)
    rejected = 0
    for _ in range(100):
        history = without_404s_of_writers(
            list(simulated(source, source.randint(4, 12), users=2 + seed % 2, lists=True, deletions=0.05))
        )
        assert check(history).wrong == 0, check(history)
        rejected += rejected_once_spoilt(source, history)
    assert rejected > 3


@pytest.mark.parametrize("seed", range(20))
def test_checker_finds_one_old_read_among_thousands(seed: int) -> None:
    source = random.Random(seed)
    history = list(simulated(source, 3000, users=3, deletions=0))
    reads = [o for o in history if o.kind == "read" and o.rows]
    late = source.choice(reads[len(reads) // 2 :])
    shown = late.rows[0].version
    old = [o for o in reads if o.user == late.user and o.rows[0].version < shown and o.returned < late.invoke - ms(99)]
    bad = [o._replace(rows=source.choice(old).rows) if o is late else o for o in history]
    verdict = check(bad)
    assert verdict.stale + verdict.non_monotonic == 1, verdict


# ---- long runs ----


def in_windows(history: list[Operation], window: float) -> Verdict:
    checker = Checker()
    waiting = deque(sorted(history, key=lambda o: o.invoke))
    until = 0
    while waiting:
        until += ms(window)
        while waiting and waiting[0].invoke <= until:
            checker.add(waiting.popleft())
        checker.advance(until)
    checker.advance(FOREVER)
    return checker.verdict


@pytest.mark.parametrize("seed", range(20))
def test_checker_accepts_right_histories_in_windows(seed: int) -> None:
    """The version of a write may become known after the write was counted; it must not count twice."""
    for window in (1, 10, 100):
        verdict = in_windows(list(simulated(random.Random(seed), 1000, users=1 + seed % 2, deletions=0.001)), window)
        assert verdict.wrong == 0, verdict


@pytest.mark.parametrize("seed", range(20))
def test_checker_rejects_wrong_histories_in_windows(seed: int) -> None:
    """Single wrong reads may be missed if the version of a write becomes known too late."""
    source = random.Random(seed)
    history = list(simulated(source, 1000, users=3, deletions=0.001))
    for _ in range(20):
        history = spoilt(source, history) or history
    whole, windows = check(history), in_windows(history, 25)
    assert windows.reads == whole.reads
    assert whole.wrong / 2 < windows.wrong < 2 * whole.wrong


@pytest.mark.parametrize("seed", range(5))
def test_window_carries_over_all_evidence_for_the_next_window(seed: int) -> None:
    source = random.Random(seed)
    history = sorted(simulated(source, 1000, users=3), key=lambda o: o.invoke)
    checker = Checker()
    middle = len(history) // 2
    for operation in history[:middle]:
        checker.add(operation)
    checker.advance(history[middle].invoke - 1)
    rest = [*checker.carry(), *checker.waiting(), *history[middle:]]
    assert check(rest).wrong == 0, check(rest)
    user = source.choice([o for o in history[:middle] if o.kind == "read" and o.rows and o.rows[0].version == 1])
    late = user._replace(invoke=history[-1].returned + 1, returned=history[-1].returned + 2)
    assert check([*rest, late]).wrong == 1


@pytest.mark.parametrize("seed", range(5))
def test_checker_forgets_old_operations_without_harm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker_module, "FORGET_AFTER_NS", ms(100))
    monkeypatch.setattr(floors, "KEPT_WRITES", 20)
    source = random.Random(seed)
    for lists in (False, True):
        history = list(simulated(source, 5000, users=2, deletions=0.0001, lists=lists))
        for order in (history, sorted(history, key=lambda o: o.invoke)):
            verdict = check(order)
            assert verdict.wrong == 0, verdict
        first = next(o for o in history if o.rows and o.kind in ("read", "list"))
        late = first._replace(invoke=history[-1].invoke + ms(1000), returned=history[-1].invoke + ms(1001))
        assert check([*history, late]).stale == 1
    checker = Checker()
    for operation in sorted(history, key=lambda o: o.invoke):
        checker.add(operation)
        checker.advance(operation.invoke - ms(1))
    kept = [len(user.writes) for user in checker._users.values()]
    assert max(kept) < 500, kept  # mostly unknown writes


def test_cost_of_a_check_per_operation_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count how often a floor is visited for each operation, instead of measuring time."""
    visits = count()
    rise = Checker._rise

    def counting(*arguments: object) -> None:
        next(visits)
        rise(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Checker, "_rise", counting)

    def cost(size: int) -> float:
        before = next(visits)
        check(list(simulated(random.Random(1), size, users=4)))
        return (next(visits) - before) / size

    small, large = cost(1000), cost(8000)
    assert large < 1.5 * small


def test_saved_history_is_loaded_unchanged(tmp_path: Path) -> None:
    history = sorted(simulated(random.Random(3), 100, users=3), key=lambda o: o.invoke)
    save(history, tmp_path / "history.ndjson.gz")
    assert list(load(tmp_path / "history.ndjson.gz")) == history
