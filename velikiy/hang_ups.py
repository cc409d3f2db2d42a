"""Notices that the other side of a connection has closed it."""

import select
import socket


def is_hung_up(connection: socket.socket) -> bool:
    """Return whether the other side has closed the connection, or its sending side."""
    return has_event(connection, select.POLLRDHUP)


def has_event(connection: socket.socket, event: int) -> bool:
    """Return whether the kernel reports the event now. It always reports POLLHUP and POLLERR too."""
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(0))
