"""Find out whether a stack is ready, and wait until it is."""

import time

from velikiy.stack import Refusal, local_http, log_view
from velikiy.stack.messages import report
from velikiy.stack.plan import Plan

READY_TIMEOUT_S = 60


def wait_until_ready(plan: Plan, *, within: float = READY_TIMEOUT_S) -> None:
    """
    Raises:
        Refusal: The stack is not ready in time.
    """
    deadline = time.monotonic() + within
    while not is_ready(plan, fully=True):
        if time.monotonic() > deadline:
            for line in log_view.latest(plan.logs, 5):
                report(line)
            raise Refusal(
                f"The stack is not healthy after {within:g} s. The last lines of each log are above; "
                f"the full logs are in {plan.logs}."
            )
        time.sleep(0.05)


def is_ready(plan: Plan, *, fully: bool = False) -> bool:
    """Return whether each edge belongs to this stack and answers /health.

    With `fully`, also require that each edge has a cache lease and that the relay listens. Responses are correct
    without both.
    """
    if fully and not plan.heartbeat.exists():
        return False
    for url in plan.edge_urls:
        try:
            identity, lease = local_http.get_signed(url + "/.edge", plan.secret("edge_secret")).split()
            if identity != plan.identity or (lease == "0" and fully):
                return False
            local_http.get(url + "/health")
        except local_http.UNANSWERED:
            return False
    return True
