"""Note when workers end, in a file beside the script of the app (APP_SCRIPT): `./run status` names workers that end
again and again while their master goes on (velikiy/stack/reaper.py does the same for processes)."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT_MOMENTS = 10


def _noted() -> Path | None:
    """Return the file, or None without `./run`, where an orchestrator counts restarts of containers only."""
    script = os.environ.get("APP_SCRIPT")
    return Path(f"{script}.workers.spawned") if script else None


def forget() -> None:
    """Forget the workers of an earlier master."""
    if noted := _noted():
        with suppress(OSError):
            noted.unlink(missing_ok=True)


def note(server: Any, worker: Any) -> None:
    """Note the end of a worker: gunicorn's hook `child_exit`."""
    noted = _noted()
    if noted is None or server.cfg.reload:  # with --reload, workers end whenever the code changes
        return
    with suppress(OSError, ValueError):
        count, *moments = noted.read_text().split() if noted.exists() else ["0"]
        moments = [*moments[1 - KEPT_MOMENTS :], str(time.time())]
        noted.write_text("".join(f"{it}\n" for it in (int(count) + 1, *moments)))
