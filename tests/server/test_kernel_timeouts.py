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
    local, peer = socket.socketpair()
    with Socket(local) as local, peer:
        yield local, peer


@pytest.mark.parametrize("seconds", [0.001, 0.1, 1.25])
def test_receiving_raises_timeout_error_after_the_timeout(pair: tuple[Socket, socket.socket], seconds: float) -> None:
    local, _ = pair
    local.settimeout(seconds)
    for receive in (lambda: local.recv(10), lambda: local.recv_into(bytearray(10))):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            receive()
        assert seconds * 0.9 <= time.monotonic() - began < seconds + 1


def test_sending_raises_timeout_error_after_the_timeout(pair: tuple[Socket, socket.socket]) -> None:
    local, _ = pair
    local.settimeout(0.1)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        local.sendall(b"x" * 10_000_000)
    assert time.monotonic() - began < 1


def test_timeout_of_sendall_covers_the_whole_call_while_a_slow_reader_makes_progress(
    pair: tuple[Socket, socket.socket],
) -> None:
    local, peer = pair
    local.settimeout(0.3)

    def read_slowly() -> None:
        with suppress(OSError):
            while peer.recv(20_000):
                time.sleep(0.05)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        local.sendall(b"x" * 10_000_000)
    assert time.monotonic() - began < 2
    local.shutdown(socket.SHUT_RDWR)
    reader.join()


def test_sendall_delivers_all_bytes_within_its_timeout(pair: tuple[Socket, socket.socket]) -> None:
    local, peer = pair
    local.settimeout(20)
    sent = random.randbytes(5_000_000)
    sender = threading.Thread(target=local.sendall, args=(sent,))
    sender.start()
    assert peer.recv(len(sent), socket.MSG_WAITALL) == sent
    sender.join()


def test_last_timeout_that_was_set_applies(pair: tuple[Socket, socket.socket]) -> None:
    local, peer = pair
    local.settimeout(0.01)
    with pytest.raises(TimeoutError):
        local.recv(10)
    local.settimeout(None)
    assert local.gettimeout() is None
    # The next recv passes the changed timeout to the kernel.
    peer.sendall(b"here")
    assert local.recv(10) == b"here"
    assert local.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)


def test_socket_takes_over_the_timeout_of_the_wrapped_socket() -> None:
    local, peer = socket.socketpair()
    local.settimeout(0.05)
    with Socket(local) as local, peer:
        assert local.gettimeout() == 0.05
        with pytest.raises(TimeoutError):
            local.recv(10)


def test_closed_peer_ends_recv_without_a_timeout(pair: tuple[Socket, socket.socket]) -> None:
    local, peer = pair
    local.settimeout(5)
    peer.close()
    assert local.recv(10) == b""
