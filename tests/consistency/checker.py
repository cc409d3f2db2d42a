"""Check that the writes of a history explain its reads: each path has to be linearizable.

The life of a user is a sequence of states: absent, version 1, version 2, ..., gone. The service numbers the states, and
each write stores a name of its own, so a read shows its position in that sequence. Only time is left to check. The
checker replays the history in the order of its invocations and returns, and keeps a **floor** for each user (floors.py):
the lowest version that may still be current. The floor rises when a write is acknowledged and when a read returns. A
read is wrong if it shows less than the floor at its invocation:

stale          less than acknowledged writes had made
non-monotonic  less than an earlier read had shown, through whichever edge
impossible     a value that was never written, that was refused or that was written only later; a write that took effect
               twice, or that changed a user who had been gone before
mixed          a list whose rows were never current at the same moment

The checker visits each operation at its invocation and at its return, and a list once for each row, so it takes the time
of sorting, n log n. Memory is bounded: a long run is checked as it goes (`add`, `advance`), and operations that are too
old to explain anything are forgotten.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.consistency.floors import ABSENT, GONE, Floor, Shown, User
from tests.consistency.history import FOREVER, OUTSIDE, Operation, Row

FORGET_AFTER_NS = 60 * 10**9
"""No operation takes that long. An operation that ended earlier than this can no longer overlap another."""

WRONG_KINDS = ("stale", "non_monotonic", "impossible", "mixed")
"""Kinds of wrong reads, as fields of `Verdict`."""

MAX_EXAMPLES = 4
"""Wrong reads of each kind that are described in words."""

MAX_FOUND = 10_000
"""Wrong reads that are kept."""


@dataclass
class Verdict:
    reads: int = 0
    """Reads that were judged, lists included."""
    lists: int = 0
    stale: int = 0
    non_monotonic: int = 0
    impossible: int = 0
    mixed: int = 0
    marked: int = 0
    """Reads that the edge marked STALE, which are not judged."""
    unsettled: int = 0
    """Reads of a user whom SQL from outside had just written, which are not judged."""
    unanswered: int = 0
    """Reads that ended in an error or without a response, and so show nothing."""
    writes: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    found: list[tuple[str, Operation]] = field(default_factory=list)
    """The first wrong reads, with their kinds."""

    @property
    def wrong(self) -> int:
        return self.stale + self.non_monotonic + self.impossible + self.mixed

    def counts(self, separator: str) -> str:
        """Return the number of wrong reads of each kind, in words."""
        return separator.join(f"{getattr(self, kind)} {title(kind)}" for kind in WRONG_KINDS)

    def __str__(self) -> str:
        return "\n".join([f"{self.reads} reads ({self.lists} lists): {self.counts(', ')}", *self.examples])


def title(kind: str) -> str:
    return kind.replace("_", "-")


class Checker:
    """Judges operations. `add` takes them in any order; `advance` judges those for which all evidence is complete."""

    def __init__(self, *, grace: float = 1.0, across: bool = False) -> None:
        """
        Args:
            grace: Seconds after which a write that bypasses the app must be visible. Until then reads of that user are
                not judged.
            across: Judge `/users` and `/users/<id>` as if they were one path.
        """
        self.verdict = Verdict()
        self.now = 0
        self._grace = int(grace * 1e9)
        self._across = across
        self._users: dict[int, User] = {}
        self._creates: dict[str, Operation] = {}
        """Creations with unknown outcome: a later read may reveal their ids."""
        self._events: list[tuple[int, int, int, Operation]] = []
        self._number = 0
        self._at_invoke: dict[int, dict[int, tuple[Shown, Shown]]] = {}
        self._live: dict[int, User] = {}
        """Users that a list has to show, unless they are deleted."""
        self._births: deque[tuple[int, User]] = deque()
        self._deaths: deque[tuple[int, User]] = deque()
        self._lists: deque[tuple[Operation, dict[int, int]]] = deque()
        self._began: int | None = None

    # ---- operations ----

    def add(self, operation: Operation) -> None:
        kind = operation.kind
        if self._began is None or operation.invoke < self._began:
            self._began = operation.invoke
        if kind in ("read", "list"):
            if operation.outcome != "ok":
                self.verdict.unanswered += 1
                return
            self.verdict.tiers[operation.tier] += 1
            if operation.tier == "STALE":
                self.verdict.marked += 1
                return
            for row in operation.rows:
                self._learn(row)
        elif kind == "initial":
            for row in operation.rows:
                user = self._user(row.user)
                user.writes.setdefault(row.name, operation)
                self._learn(row)
        else:
            self.verdict.writes[operation.outcome] += 1
            self._add_write(operation)
        self._number += 1
        heapq.heappush(self._events, (operation.invoke, 0, self._number, operation))

    def _add_write(self, operation: Operation) -> None:
        if operation.user is None:
            self._creates[operation.name] = operation
            return
        user = self._user(operation.user)
        if operation.kind == "delete":
            return
        user.writes[operation.name] = operation
        if operation.kind == "create" and operation.happened:
            self._learn(Row(operation.user, 1, operation.name))

    def _learn(self, row: Row) -> None:
        """Store the version of a write. It is stored before the replay gets there, because it holds at all times."""
        user = self._user(row.user)
        user.version_of.setdefault(row.name, row.version)
        user.name_of.setdefault(row.version, row.name)
        if row.name not in user.counted:
            user.taken.add(row.version)

    def _user(self, number: int) -> User:
        user = self._users.get(number)
        if user is None:
            user = self._users[number] = User(number, across=self._across)
        return user

    # ---- the replay ----

    def advance(self, until: int) -> None:
        """Judge the operations that returned by then. All operations that were invoked by then must have been added."""
        events = self._events
        while events and events[0][0] <= until:
            at, phase, number, operation = heapq.heappop(events)
            if phase == 0:
                self._invoked(number, operation)
                if operation.outcome != "unknown":
                    # A return comes after the invocations of the same nanosecond, because intervals are closed.
                    heapq.heappush(events, (operation.returned, 1, number, operation))
            else:
                self._returned(at, number, operation)
        self.now = max(self.now, min(until, FOREVER))
        while self._births and self._births[0][0] < self.now - FORGET_AFTER_NS:
            self._births.popleft()
        while self._deaths and self._deaths[0][0] < self.now - FORGET_AFTER_NS:
            self._deaths.popleft()[1].bury()

    def _invoked(self, number: int, operation: Operation) -> None:
        kind = operation.kind
        if kind == "list":
            self._at_invoke[number] = {
                user.number: (user.acknowledged.now, user.listed.now) for user in self._live.values()
            }
            return
        if kind == "initial":
            return
        if operation.user is None:
            return
        user = self._user(operation.user)
        if kind == "read" or operation.status == 404:
            self._at_invoke[number] = {user.number: (user.acknowledged.now, user.read.now)}
            return
        if not operation.happened:
            return
        if operation.edge == OUTSIDE:
            user.unsettled_until = max(user.unsettled_until, operation.returned + self._grace)
        reached = max(user.read.now, user.listed.now, key=lambda shown: shown.version)
        if operation.outcome == "ok" and reached.version == GONE:
            self._wrong("impossible", operation, None, None, reached, "it changed a user who was gone")
        if kind == "delete":
            user.deletion = operation.invoke if user.deletion is None else min(user.deletion, operation.invoke)
            user.deletions.append(operation)
        elif kind == "update":
            user.possible += 1
            user.before[operation.name] = reached.version
            if operation.outcome == "ok":
                for floor in user.floors:
                    floor.invoked(operation.name)

    def _returned(self, at: int, number: int, operation: Operation) -> None:
        kind = operation.kind
        if kind == "list":
            self._judge_list(operation, self._at_invoke.pop(number))
        elif kind == "read":
            self._judge_read(operation, self._at_invoke.pop(number))
        elif kind == "initial":
            for row in operation.rows:
                user = self._user(row.user)
                user.possible = max(user.possible, row.version + user.possible - 1)
                user.forgot = row.version > 1  # the history does not contain the earlier versions
                if row.version == GONE:
                    user.deletion = operation.invoke
                self._rise(user, user.floors, row.version, operation, at)
        elif operation.status == 404 and operation.user is not None:
            # A write that gets 404 is evidence like a read, because it has read PostgreSQL.
            self._judge_absence(self._user(operation.user), operation, *self._at_invoke.pop(number)[operation.user])
        elif operation.outcome == "ok" and operation.user is not None:
            self._acknowledged(self._user(operation.user), operation, at)
        if kind == "update" and operation.user is not None:
            user = self._user(operation.user)
            user.over.append(operation)
            user.forget(at - FORGET_AFTER_NS)

    def _acknowledged(self, user: User, operation: Operation, at: int) -> None:
        if operation.kind != "update":
            self._rise(user, user.floors, GONE if operation.kind == "delete" else 1, operation, at)
        else:
            version = user.version_of.get(operation.name)
            if version is None:
                user.counted.add(operation.name)
            for floor in user.floors:
                reached = floor.returned(operation.name, user.taken, version is not None)
                self._rise(user, (floor,), max(reached, version or ABSENT), operation, at)

    def _rise(self, user: User, floors: Iterable[Floor], version: int, because: Operation, at: int) -> None:
        for floor in floors:
            before = floor.now.version
            if not floor.rise(version, because, at):
                continue
            if floor is user.listed:
                user.rise_times.append(at)
                user.rise_versions.append(version)
                if before == ABSENT:
                    self._births.append((at, user))
            if user.listed.now.version > ABSENT:
                self._live[user.number] = user
        if user.acknowledged.now.version == GONE:
            self._live.pop(user.number, None)
            if because.kind == "delete":
                self._deaths.append((at, user))

    # ---- one user ----

    def _judge_read(self, operation: Operation, floors: dict[int, tuple[Shown, Shown]]) -> None:
        assert operation.user is not None
        self.verdict.reads += 1
        user = self._user(operation.user)
        if user.unsettled_until > operation.invoke:
            self.verdict.unsettled += 1
            return
        acknowledged, shown = floors[user.number]
        if not operation.rows:
            self._judge_absence(user, operation, acknowledged, shown)
        elif self._judge_row(user, operation.rows[0], operation, acknowledged, shown):
            self._rise(user, (user.read,), operation.rows[0].version, operation, operation.returned)

    def _judge_absence(self, user: User, operation: Operation, acknowledged: Shown, shown: Shown) -> None:
        if shown.version == ABSENT:
            return  # not yet there, or gone already: both are possible
        if not user.may_be_gone(operation.returned):
            self._wrong("stale" if acknowledged.version > ABSENT else "non_monotonic", operation, None, user, shown)
            return
        self._rise(user, (user.read,), GONE, operation, operation.returned)

    def _judge_row(self, user: User, row: Row, operation: Operation, acknowledged: Shown, shown: Shown) -> bool:
        write = user.writes.get(row.name)
        if write is None and row.version == 1 and row.name in self._creates:
            write = self._creates[row.name]
        if row.version < acknowledged.version and (write or user.forgot):
            self._wrong("stale", operation, row, user, acknowledged)
            return False
        if row.version < shown.version and (write or user.forgot):
            self._wrong("non_monotonic", operation, row, user, shown)
            return False
        why = self._why_impossible(user, row, operation, write)
        if why:
            self._wrong("impossible", operation, row, user, None, why)
            return False
        return True

    def _why_impossible(self, user: User, row: Row, operation: Operation, write: Operation | None) -> str:
        if write is None:
            return "no write has this name"
        if not write.happened:
            return f"this write was refused ({write.status})"
        if write.invoke > operation.returned:
            return "this write was sent only later"
        if user.version_of[row.name] != row.version:
            return f"this write was also seen as version {user.version_of[row.name]}: it took effect twice"
        if user.name_of[row.version] != row.name:
            return f"another write was seen as this version: {user.name_of[row.version]!r}"
        if row.version > user.possible:
            return f"at most {user.possible} versions are possible so far"
        if row.version <= user.before.get(row.name, ABSENT):
            return f"version {user.before[row.name]} had been reached before this write was invoked"
        return ""

    # ---- a list ----

    def _judge_list(self, operation: Operation, floors: dict[int, tuple[Shown, Shown]]) -> None:
        """Judge each row by itself, and then all together: there must be one moment at which all were current."""
        self.verdict.reads += 1
        self.verdict.lists += 1
        until = FOREVER if operation.until is None else operation.until
        rows = {row.user: row for row in operation.rows}
        wrong_before = self.verdict.wrong
        # The closed interval of the moments at which the list can have been read, and the moments within it at which it
        # cannot.
        first, last = operation.invoke, operation.returned
        holes: list[tuple[int, int]] = []
        seen: dict[int, int] = {}
        skipped = False

        for number, row in rows.items():
            user = self._user(number)
            if user.unsettled_until > operation.invoke:
                skipped = True
                continue
            acknowledged, shown = floors.get(number) or self._not_live(user, operation)
            if not self._judge_row(user, row, operation, acknowledged, shown):
                break  # a list with several wrong rows is one wrong read
            write = user.writes.get(row.name) or self._creates.get(row.name)
            first = max(first, write.invoke if write else first)
            last = min(last, user.ended(row.version))
            seen[number] = row.version
        else:
            for number, (acknowledged, shown) in floors.items():
                if number in rows or not operation.after < number <= until or shown.version == ABSENT:
                    continue
                user = self._users[number]
                if user.unsettled_until > operation.invoke:
                    skipped = True
                    continue
                if not user.may_be_gone(operation.returned):
                    kind = "stale" if acknowledged.version > ABSENT else "non_monotonic"
                    self._wrong(kind, operation, None, user, acknowledged if kind == "stale" else shown)
                    break
                assert user.deletion is not None
                first = max(first, user.deletion)
                seen[number] = GONE
            for at, user in reversed(self._births):
                if at <= operation.invoke:
                    break
                covered = operation.after < user.number <= until and user.number not in rows
                if not covered or at > operation.returned or user.unsettled_until > operation.invoke:
                    continue
                if user.number in floors:
                    continue
                if user.may_be_gone(operation.returned):
                    assert user.deletion is not None
                    holes.append((at, user.deletion))
                else:
                    last = min(last, at)

        self.verdict.unsettled += skipped
        if self.verdict.wrong != wrong_before:
            return
        if not _room(first, last, holes):
            self._wrong("mixed", operation, None, None, None, "its rows were never current at the same moment")
            return
        if self._forked(operation, seen):
            return
        for number, version in seen.items():
            user = self._users[number]
            self._rise(user, (user.listed,), version, operation, operation.returned)
        self._lists.append((operation, seen))

    def _not_live(self, user: User, operation: Operation) -> tuple[Shown, Shown]:
        """Return the floors of a user that was not expected in a list: deleted before, or not yet there."""
        floor = user.acknowledged
        if floor.now.version == GONE and floor.at < operation.invoke:
            return floor.now, floor.now
        return Shown(ABSENT, None), Shown(ABSENT, None)

    def _forked(self, operation: Operation, seen: dict[int, int]) -> bool:
        """Find another list at the same time that is newer in one row and older in another row: two lists may come in
        either order, but not in both."""
        while self._lists and self._lists[0][0].returned < operation.invoke - FORGET_AFTER_NS:
            self._lists.popleft()
        for other, others in reversed(self._lists):
            if other.returned < operation.invoke:
                break  # lists are judged in the order of their returns
            newer = older = False
            for number in seen.keys() | others.keys():
                here = seen[number] if number in seen else self._not_shown(number, operation)
                there = others[number] if number in others else self._not_shown(number, other)
                if here is not None and there is not None:
                    newer |= here > there
                    older |= here < there
            if newer and older:
                why = f"{self._describe(other)}, at the same time, shows some rows newer and some rows older"
                self._wrong("mixed", operation, None, None, None, why)
                return True
        return False

    def _not_shown(self, number: int, operation: Operation) -> int | None:
        """Return the state that a list shows of a user that it leaves out; None if that shows nothing."""
        user = self._users[number]
        covered = operation.after < number <= (FOREVER if operation.until is None else operation.until)
        if not covered or user.may_be_gone(operation.returned) or user.unsettled_until > operation.invoke:
            return None
        return ABSENT

    # ---- in words ----

    def _wrong(
        self, kind: str, operation: Operation, row: Row | None, user: User | None, floor: Shown | None, why: str = ""
    ) -> None:
        setattr(self.verdict, kind, getattr(self.verdict, kind) + 1)
        if len(self.verdict.found) < MAX_FOUND:
            self.verdict.found.append((kind, operation))
        if getattr(self.verdict, kind) > MAX_EXAMPLES:
            return
        text = f"{title(kind)}: {self._describe(operation)}"
        if row:
            text += f" showed version {row.version} {row.name!r} of user {row.user}"
        elif user:
            text += f" showed no user {user.number}"
        if floor and floor.because:
            what = "it was gone" if floor.version == GONE else f"version {floor.version} or later was current"
            text += f", but {what}, because of {self._describe(floor.because)}"
        self.verdict.examples.append(f"{text}{': ' + why if why else ''}")

    def _describe(self, operation: Operation) -> str:
        began = self._began or 0
        first, last = ((t - began) / 1e9 for t in (operation.invoke, operation.returned))
        method = {"create": "POST", "update": "PUT", "delete": "DELETE"}.get(operation.kind, "GET")
        via = " ".join(part for part in (operation.edge, operation.tier) if part)
        wrote = f" {operation.name!r}" if operation.name else ""
        return f"{method} {operation.path}{wrote} ({via or '-'}, {first:.6f} to {last:.6f} s)"

    # ---- windows ----

    def carry(self) -> Iterator[Operation]:
        """Return the operations that the rest of the history is judged by, so that it can be checked by itself."""
        for user in self._users.values():
            if user.forgot and not user.writes:
                continue  # the user is gone for long
            version = min(user.read.now.version, user.listed.now.version)
            recent = [] if version == GONE else list(user.writes.values())[-50:]
            late = [write for write in user.writes.values() if write.outcome == "unknown"]
            yield from {id(write): write for write in [*late, *recent] if write.kind != "initial"}.values()
            if version < GONE:
                yield from user.deletions
            if version > ABSENT:
                row = Row(user.number, version, user.name_of.get(version, ""))
                path = f"/users/{user.number}"
                yield Operation(self.now, self.now, "initial", path, "ok", user=user.number, rows=(row,))
        yield from self._creates.values()

    def waiting(self) -> list[Operation]:
        """Return the operations that were added and not yet judged."""
        return [operation for _, _, _, operation in self._events]


def _room(first: int, last: int, holes: list[tuple[int, int]]) -> bool:
    """Return whether the closed interval contains a moment outside all of the open holes."""
    for begin, end in sorted(holes):
        if begin < first < end:
            first = end
    return first <= last


def check(history: Iterable[Operation], *, grace: float = 1.0, across: bool = False) -> Verdict:
    """Judge a whole history at once."""
    checker = Checker(grace=grace, across=across)
    for operation in history:
        checker.add(operation)
    checker.advance(FOREVER)
    return checker.verdict
