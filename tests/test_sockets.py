"""Sockets whose timeout the kernel keeps (velikiy/sockets.py)."""

import socket
import time
from collections.abc import Iterator

import pytest

from velikiy.sockets import Socket


@pytest.fixture
def pair() -> Iterator[tuple[Socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with Socket(ours) as ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("seconds", [0.001, 0.1, 1.25])
def test_who_gets_nothing_in_time_is_told_so(pair: tuple[Socket, socket.socket], seconds: float) -> None:
    ours, _ = pair
    ours.settimeout(seconds)
    for receive in (lambda: ours.recv(10), lambda: ours.recv_into(bytearray(10))):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            receive()
        assert seconds * 0.9 <= time.monotonic() - began < seconds + 1


def test_who_cannot_send_in_time_is_told_so(pair: tuple[Socket, socket.socket]) -> None:
    ours, _ = pair
    ours.settimeout(0.1)
    with pytest.raises(TimeoutError):
        ours.sendall(b"x" * 10_000_000)


def test_the_timeout_that_was_set_last_counts(pair: tuple[Socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.settimeout(0.01)
    with pytest.raises(TimeoutError):
        ours.recv(10)
    ours.settimeout(None)
    assert ours.gettimeout() is None
    # The kernel has been told by the time that it waits again.
    theirs.sendall(b"here")
    assert ours.recv(10) == b"here"
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)


def test_it_takes_over_the_timeout_of_the_other() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.05)
    with Socket(ours) as ours, theirs:
        assert ours.gettimeout() == 0.05
        with pytest.raises(TimeoutError):
            ours.recv(10)


def test_the_end_of_the_other_side_is_no_timeout(pair: tuple[Socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.settimeout(5)
    theirs.close()
    assert ours.recv(10) == b""
