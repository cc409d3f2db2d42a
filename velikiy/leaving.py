"""The state of a process that is about to stop. An edge then sends its requests to another instance."""

import threading

_is_leaving = threading.Event()


def begin() -> None:
    _is_leaving.set()


def has_begun() -> bool:
    return _is_leaving.is_set()
