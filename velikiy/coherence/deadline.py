"""The deadline of a write: the moment after which it must not be committed, because the edge answers 504.

A write that waits in a stopped worker, or behind others, would otherwise be committed seconds after its client was
answered 504, over newer writes that were acknowledged meanwhile. The edge sends with each write how long it waits
(edge/lua/write.lua), and the app compares right before COMMIT (`velikiy/coherence/protocol.py:_check_deadline`).
"""

import re
import socket
import struct

from velikiy.coherence.host import name_in_this_boot
from velikiy.coherence.timing import now

LAST_DATA_RECEIVED = 52
"""The offset of `tcpi_last_data_recv` in Linux' `struct tcp_info`: a number of 32 bits, in milliseconds (tcp(7))."""


CLOCK = name_in_this_boot("time")
"""The name of the clock that `now` counts with. A time namespace can shift that clock for a container."""


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
