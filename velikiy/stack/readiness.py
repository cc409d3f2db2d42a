"""Find out whether a stack is ready, and wait until it is."""

import json
import time

from velikiy.findings import Finding
from velikiy.stack import Refusal, local_http, log_view, reaper
from velikiy.stack.messages import report
from velikiy.stack.plan import Plan

READY_TIMEOUT_S = 120
"""A machine with far too much work takes so long. A program that cannot start is noticed long before."""


def wait_until_ready(plan: Plan, *, within: float = READY_TIMEOUT_S) -> None:
    """
    Raises:
        Refusal: A program ends again and again, or the stack is not ready in time.
    """
    began, deadline = time.time(), time.monotonic() + within
    names = ["relay", *plan.instances]
    while not is_ready(plan, fully=True):
        failing = next((name for name in names if ends_again_and_again(plan, name, began)), "")
        if failing or time.monotonic() > deadline:
            for line in log_view.latest(plan.logs, 5):
                report(line)
            reason = f", because {failing} ends again and again" if failing else f" after {within:g} s"
            raise Refusal(
                f"The stack is not healthy{reason}. The last lines of each log are above; "
                f"the full logs are in {plan.logs}."
            )
        time.sleep(0.05)


def ends_again_and_again(plan: Plan, name: str, since: float) -> bool:
    """Return whether the program was started again so often since then (Unix time) that it will not stay."""
    _, moments = reaper.starts(plan.home / "run" / f"{name}.spawned")
    return sum(since < moment <= time.time() for moment in moments) > reaper.CRASH_LOOP_RESTARTS


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


def findings_at(edge_url: str) -> list[Finding]:
    """Return what an edge and its apps say at /readyz while they are ready; nothing if they are not."""
    try:
        state = json.loads(local_http.get(f"{edge_url}/readyz"))
    except local_http.UNANSWERED:
        return []
    return [Finding.from_json(it) for it in state.get("findings", [])]
