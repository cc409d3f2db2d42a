"""Sockets whose timeout the kernel keeps (velikiy/kernel_timeouts.py)."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from velikiy.kernel_timeouts import Socket


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
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ours.sendall(b"x" * 10_000_000)
    assert time.monotonic() - began < 1


def test_what_goes_bit_by_bit_has_no_more_time_than_what_does_not_go(pair: tuple[Socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.settimeout(0.3)

    def read_slowly() -> None:
        with suppress(OSError):
            while theirs.recv(20_000):
                time.sleep(0.05)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ours.sendall(b"x" * 10_000_000)
    assert time.monotonic() - began < 2
    ours.shutdown(socket.SHUT_RDWR)
    reader.join()


def test_all_arrives_where_there_is_time_for_it(pair: tuple[Socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.settimeout(20)
    sent = random.randbytes(5_000_000)
    sender = threading.Thread(target=ours.sendall, args=(sent,))
    sender.start()
    assert theirs.recv(len(sent), socket.MSG_WAITALL) == sent
    sender.join()


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
