"""Clients that would take everything, for the row `crowd`: slow connections, and searches that no cache answers.

`python -m bench.crowd URL SLOW SEARCHING` prints "ready" and goes on until it is killed. A slow connection sends a
header or a body byte by byte, and opens another connection when the edge closes it. A searching client sends its next
search when it has the response, and waits for Retry-After when it is refused.
"""

import asyncio
import itertools
import sys
from urllib.parse import urlsplit

BYTE_INTERVAL_S = 0.5
RECONNECT_S = 0.2

HALF_HEADER = b"GET /users/2 HTTP/1.1\r\nHost: bench\r\nX-Slow: "
HALF_BODY = b"POST /users HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n"


async def be_slow(host: str, port: int, beginning: bytes, opened: asyncio.Semaphore) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(beginning)
            opened.release()
            while not reader.at_eof():
                writer.write(b" ")
                await writer.drain()
                try:
                    await asyncio.wait_for(reader.read(4096), BYTE_INTERVAL_S)
                except TimeoutError:
                    continue
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(RECONNECT_S)


async def search(host: str, port: int, words: "itertools.count[int]", answered: asyncio.Semaphore) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
            while True:
                writer.write(b"GET /users?q=word%d HTTP/1.1\r\nHost: bench\r\n\r\n" % next(words))
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                answered.release()
                if wait := head.partition(b"\r\nretry-after: ")[2]:
                    await asyncio.sleep(float(wait.split(b"\r\n")[0]))
        except (OSError, asyncio.IncompleteReadError, ValueError):
            await asyncio.sleep(RECONNECT_S)


async def main(url: str, slow: int, searching: int) -> None:
    address = urlsplit(url)
    host, port = str(address.hostname), int(address.port or 80)
    opened, answered, words = asyncio.Semaphore(0), asyncio.Semaphore(0), itertools.count()
    beginnings = itertools.cycle([HALF_HEADER, HALF_BODY])
    tasks = [asyncio.create_task(be_slow(host, port, next(beginnings), opened)) for _ in range(slow)]
    tasks += [asyncio.create_task(search(host, port, words, answered)) for _ in range(searching)]
    for _ in range(slow):
        await opened.acquire()
    for _ in range(searching):
        await answered.acquire()
    print("ready", flush=True)
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
