"""The deadline of a write: the moment after which it must not be committed, because the edge answers 504. A write whose
edge has closed the connection, because its client is gone, is over as well.

A write that waits in a stopped worker, or behind others, would otherwise be committed seconds after its client was
answered 504, over newer writes that were acknowledged meanwhile. The edge sends with each write how long it waits
(edge/lua/write.lua). The app compares right before COMMIT (`velikiy/coherence/protocol.py:_check_deadline`), and
PostgreSQL compares once more when it has received the COMMIT (`velikiy/postgres/database.py:IN_TIME`): a process may be
stopped between the two.
"""

import re
import socket
import struct
from typing import NamedTuple

from velikiy.coherence.host import name_in_this_boot
from velikiy.coherence.timing import now
from velikiy.hang_ups import is_hung_up

LAST_DATA_RECEIVED = 52
"""The offset of `tcpi_last_data_recv` in Linux' `struct tcp_info`: a number of 32 bits, in milliseconds (tcp(7))."""


CLOCK = name_in_this_boot("time")
"""The name of the clock that `now` counts with. A time namespace can shift that clock for a container."""


OWN_DEADLINE_S = 8
"""Seconds that a write without a deadline from an edge may take, besides DATABASE_TIMEOUT: as long as an edge allows a
batch. Its client may have given up long ago."""


class Deadline(NamedTuple):
    moment: float
    """`timing.now`"""

    edge: socket.socket | None = None
    """The connection to the edge that has sent the write. Other clients may close their sending side and wait."""

    def is_over(self) -> bool:
        return now() >= self.moment or (self.edge is not None and is_hung_up(self.edge))


def deadline_of(header: str | None, connection: socket.socket | None, timeout: float) -> Deadline:
    """Return the deadline of a write.

    Args:
        header: The header `Write-Deadline`.
        connection: The socket that the request arrived on, if it is known.
        timeout: DATABASE_TIMEOUT.
    """
    moment = parse(header, connection) if header else None
    if moment is None:
        return Deadline(now() - _queued(connection) + timeout + OWN_DEADLINE_S)
    return Deadline(moment, connection)


def parse(header: str, connection: socket.socket | None) -> float | None:
    """Return the moment (`now`) that the header `Write-Deadline` stands for, or None if it is not one.

    Args:
        header: `<clock> <moment> <left>`: the name of the sender's clock, the deadline on that clock, and the time that
            was left when the request was sent; both in milliseconds.
        connection: The socket that the request arrived on, if it is known.
    """
    given = re.fullmatch(r"([0-9a-z]{1,64}) ([0-9]{1,18}) ([0-9]{1,9})", header)
    if not given:
        return None
    clock, moment, left = given.groups()
    if clock == CLOCK:
        return int(moment) / 1000
    return now() - _queued(connection) + int(left) / 1000


def _queued(connection: socket.socket | None) -> float:
    """Return the seconds that the request has waited in this machine's kernel. No clock of another machine is needed
    for that, and it also counts while this process is stopped.

    An edge that reaches this app over a Unix socket is on this machine and shares its clock.
    """
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return 0.0
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    (milliseconds,) = struct.unpack_from("I", information, LAST_DATA_RECEIVED)
    return float(milliseconds) / 1000
