"""Inject one fault after another into a service: calm, begin, hold, end, recovered."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator

import orjson

from tests.chaos.fault import Fault
from tests.chaos.probes import NO_USER
from tests.chaos.result import Result
from tests.chaos.service import OWN_ROWS, Interrupted, Missing, Service

NAMED_WITHIN_S = 3.0
"""Status has to name a fault within this time. The look itself may take 1.4 s more."""

SETTLED_WITHIN_S = 40.0
"""Both caches are in use again that long after a fault, once fences are forgotten. Else another service is started."""

SERVED_WITHIN_S = 0.5
"""A request that takes no longer is answered as in calm."""

CALM_S = 0.3
LAST_BEGIN_S = 5.0
"""No fault begins in the last seconds of the run."""


class Broken(Exception):
    """The service did not come back."""


class Director:
    """Runs in a thread beside the load. `results` grows; `Chaos` completes each result once its time is judged."""

    def __init__(self, service: Service, scenarios: Iterator[tuple[Fault, ...]], deadline: float, seed: str) -> None:
        """
        Args:
            deadline: The time (monotonic) at which the run ends.
        """
        self.over = threading.Event()
        self.service = service
        self.results: list[Result] = []
        self.missing: dict[str, str] = {}
        """The reason, by the name of each fault that cannot be injected on this machine."""
        self.error: BaseException | None = None
        self._scenarios, self._deadline = scenarios, deadline
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._run, name="director")

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self.service.ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._own_rows() as rows:
                self._rows = rows
                self._settle()
                while time.monotonic() < self._deadline - LAST_BEGIN_S:
                    scenario = next(self._scenarios, None)
                    if scenario is None:
                        break
                    self._play(scenario)
        except Interrupted:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()

    @contextlib.contextmanager
    def _own_rows(self) -> Iterator[list[int]]:
        """Yield a row for each edge, which only the director writes."""
        with contextlib.ExitStack() as rows:
            created: list[int] = []

            def has_created() -> bool:
                with contextlib.suppress(AssertionError):  # the service has just started
                    created.append(rows.enter_context(self.service.row(len(created))))
                return len(created) == len(self.service.edges)

            self.service.until(has_created, within=SETTLED_WITHIN_S, what="the service answers writes")
            yield created

    # ---- one fault ----

    def _play(self, scenario: tuple[Fault, ...]) -> None:
        result = Result([fault.name for fault in scenario])
        self.service.violations, self.service.notes = [], []
        self.service.wait(CALM_S)
        result.begin = time.monotonic_ns()
        try:
            with contextlib.ExitStack() as injected:
                for fault in scenario:
                    injected.enter_context(fault.inject(self.service, self._random))
                self._hold(scenario, result)
                result.end = time.monotonic_ns()
        except Interrupted:
            result.failures.append("interrupted")
            raise
        except Missing as reason:
            self.missing |= {fault.name: str(reason) for fault in scenario}
            return
        except Exception as error:
            # Beside another fault, a fault may not find what it needs.
            reasons = result.failures if len(scenario) == 1 else self.service.notes
            reasons.append(f"it could not be injected or undone: {type(error).__name__} {error}")
        finally:
            result.end = result.end or time.monotonic_ns()
        undone = time.monotonic()
        try:
            self.service.until(self._is_recovered, within=SETTLED_WITHIN_S, what="every edge answers again")
            # From the end of the hold: undoing a fault, such as a start of a server, is a part of the recovery.
            result.recovery_s = time.monotonic() - result.end / 1e9
            self._settle()
        except AssertionError as error:
            result.failures.append(f"it did not recover in {time.monotonic() - undone:.0f} s: {error}")
            raise Broken(result.name) from error
        finally:
            result.until = time.monotonic_ns()
            result.notes = [*dict.fromkeys(self.service.notes)]
            result.failures += dict.fromkeys(self.service.violations)
            self.results.append(result)

    def _hold(self, scenario: tuple[Fault, ...], result: Result) -> None:
        """Hold the fault until status has named it and its time is over."""
        began = time.monotonic()
        names = {name for fault in scenario for name in fault.named} if len(scenario) == 1 else set()
        looked, seen = began, set[str]()
        while names and not result.named and looked <= began + NAMED_WITHIN_S:
            looked = time.monotonic()
            seen = {it.name for it in self.service.findings()}
            if found := names & seen:
                result.named, result.named_s = min(found), time.monotonic() - began
            else:
                self.service.wait(0.05)
        if names and not result.named:
            wanted, shown = " or ".join(sorted(names)), ", ".join(sorted(seen)) or "nothing"
            result.failures.append(
                f"status did not name it within {NAMED_WITHIN_S:g} s: it showed {shown}, not {wanted}"
            )
        self.service.wait(max(0.0, began + max(fault.seconds for fault in scenario) - time.monotonic()))

    # ---- after it ----

    def _is_recovered(self) -> bool:
        """Return whether a write, a hit and a miss through each edge are answered as in calm."""
        return all(self._is_edge_recovered(edge, user) for edge, user in enumerate(self._rows))

    def _is_edge_recovered(self, edge: int, user: int) -> bool:
        name = f"{OWN_ROWS}{time.monotonic_ns()}"
        for method, path, body, status in (
            ("PUT", f"/users/{user}", {"name": name}, 200),
            ("GET", f"/users/{user}", None, 200),
            ("GET", f"/users/{NO_USER + self._random.randrange(NO_USER)}", None, 404),
        ):
            began = time.monotonic()
            response = self.service.request(edge, method, path, body, timeout=3)
            took = time.monotonic() - began
            if not response or response.status != status or took > SERVED_WITHIN_S:
                return False
            if method == "GET" and status == 200 and orjson.loads(response.body)["name"] != name:
                self.service.violation(f"edge{edge + 1} answered {method} {path} with an older name than was written")
        return True

    def _settle(self) -> None:
        """Wait until all caches are in use and nothing is wrong, so that each fault starts from the same state."""
        self.service.forget()
        try:
            self.service.until(self._is_calm, within=SETTLED_WITHIN_S)
        except AssertionError:
            raise AssertionError(f"the caches are not all in use again: {self._unsettled or 'no hits'}") from None

    def _is_calm(self) -> bool:
        self.service.forget()
        self._unsettled = ", ".join(sorted({it.name for it in self.service.findings() if it.wrong}))
        return not self._unsettled and all(self._is_hit(edge, user) for edge, user in enumerate(self._rows))

    def _is_hit(self, edge: int, user: int) -> bool:
        for _ in range(2):
            response = self.service.request(edge, "GET", f"/users/{user}", timeout=3)
        return response is not None and response.header(b"X-Cache-Status") == "HIT"

    _unsettled = ""
    _rows: list[int]
