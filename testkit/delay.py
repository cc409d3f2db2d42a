"""Hold each packet of a queue of the kernel for some time: `delay.py QUEUE SECONDS`, in the network namespace of a host.

This kernel may lack netem, the part that delays packets. NFQUEUE hands each packet to this process, which lets it go
later (linux/netfilter/nfnetlink_queue.h). Only the number of the packet is copied, not its content.
"""

import select
import socket
import struct
import sys
import time
from collections import deque

NETLINK_NETFILTER = 12
REQUEST = 1
SUBSYSTEM_QUEUE = 3 << 8
PACKET, VERDICT, CONFIG = 0, 1, 2
CONFIG_COMMAND, CONFIG_PARAMETERS = 1, 2
BIND, COPY_META = 1, 1
PACKET_HEADER, VERDICT_HEADER = 1, 2
ACCEPT = 1


def message(kind: int, queue: int, attribute: int, value: bytes) -> bytes:
    padded = value.ljust(-(-len(value) // 4) * 4, b"\0")
    body = struct.pack("!BBH", 0, 0, queue) + struct.pack("HH", 4 + len(value), attribute) + padded
    return struct.pack("IHHII", 16 + len(body), SUBSYSTEM_QUEUE | kind, REQUEST, 0, 0) + body


def packet_numbers(data: bytes) -> list[int]:
    """Return the numbers of the packets that these messages announce."""
    numbers = []
    while len(data) >= 16:
        length, kind = struct.unpack_from("IH", data)
        attributes = data[20:length] if kind == SUBSYSTEM_QUEUE | PACKET else b""
        while len(attributes) >= 4:
            size, attribute = struct.unpack_from("HH", attributes)
            if attribute & 0x3FFF == PACKET_HEADER:
                numbers.append(struct.unpack_from("!I", attributes, 4)[0])
            attributes = attributes[-(-size // 4) * 4 :]
        data = data[-(-length // 4) * 4 :]
    return numbers


def main(queue: int, seconds: float) -> None:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    netlink.bind((0, 0))
    netlink.send(message(CONFIG, queue, CONFIG_COMMAND, struct.pack("!BxH", BIND, 0)))
    netlink.send(message(CONFIG, queue, CONFIG_PARAMETERS, struct.pack("!IB", 0, COPY_META)))
    held: deque[tuple[float, int]] = deque()
    while True:
        pause = max(0.0, held[0][0] - time.monotonic()) if held else None
        if select.select([netlink], [], [], pause)[0]:
            due = time.monotonic() + seconds
            held.extend((due, number) for number in packet_numbers(netlink.recv(65_536)))
        while held and held[0][0] <= time.monotonic():
            netlink.send(message(VERDICT, queue, VERDICT_HEADER, struct.pack("!II", ACCEPT, held.popleft()[1])))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
