"""Files that browsers and crawlers request from every site: /favicon.ico and /robots.txt."""

import hashlib
import struct
import zlib
from itertools import product

from flask import Blueprint, Flask, Response, request

from velikiy.http import requests

ROBOTS = b"User-agent: *\nDisallow: /\n"
"""Nothing here is for search engines: the rows are data of people, and the documents belong to one installation."""

MAX_AGE_S = 24 * 60 * 60
"""The addresses are fixed, so a new icon reaches every browser within this time."""

SIZE = 32
"""Pixels of the icon's edge. Browsers scale it down to 16."""

SAMPLES = 4
"""Points of a pixel in each direction, so that edges are smooth."""

Colour = tuple[int, int, int, int]

NOTHING: Colour = (0, 0, 0, 0)
GROUND: Colour = (31, 41, 63, 255)
GLASS: Colour = (255, 255, 255, 255)
TIERS: tuple[Colour, ...] = ((46, 160, 90, 255), (52, 120, 220, 255), (138, 85, 205, 255))
"""The layers of the liquid, from the top: Nginx, Redis and PostgreSQL, in the colours of the console."""


def install(app: Flask) -> None:
    """Add both files. They need no API key."""
    routes = Blueprint("site_files", __name__)

    def file(name: str, content: bytes, media_type: str) -> None:
        etag = hashlib.blake2b(content, digest_size=12).hexdigest()

        def send() -> Response:
            requests.parameters()
            response = Response(content, content_type=media_type)
            response.headers["Cache-Control"] = f"public, max-age={MAX_AGE_S}"
            response.set_etag(etag)
            if request.if_none_match.contains_weak(etag):
                response.status_code = 304
                response.set_data(b"")
            return response

        routes.add_url_rule(f"/{name}", name.replace(".", "_"), send, methods=["GET"])

    file("favicon.ico", icon(), "image/x-icon")
    file("robots.txt", ROBOTS, "text/plain; charset=utf-8")
    app.register_blueprint(routes)


def icon() -> bytes:
    """Return the icon as an ICO file, which contains one PNG file. All browsers read it, also in dark mode."""
    rows = (b"\0" + b"".join(bytes(_pixel(x, y)) for x in range(SIZE)) for y in range(SIZE))
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 6, 0, 0, 0)  # 8 bits each of red, green, blue and opacity
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows), 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    folder = struct.pack("<HHH", 0, 1, 1)
    return folder + struct.pack("<BBBBHHII", SIZE, SIZE, 0, 0, 1, 32, len(png), len(folder) + 16) + png


def _pixel(x: int, y: int) -> Colour:
    """Return the mean colour of the points of a pixel."""
    steps = [(number + 0.5) / SAMPLES for number in range(SAMPLES)]
    points = [_point(x + right, y + down) for right, down in product(steps, steps)]
    opacity = sum(point[3] for point in points)
    if not opacity:
        return NOTHING
    red, green, blue = (sum(point[channel] * point[3] for point in points) // opacity for channel in range(3))
    return red, green, blue, opacity // len(points)


def _point(x: float, y: float) -> Colour:
    """Return the colour of a point: a flask with three layers of liquid, on a square with round corners."""
    aside = abs(x - SIZE / 2)
    if not _is_on_ground(aside, abs(y - SIZE / 2)):
        return NOTHING
    width = _half_width(y)
    if aside > width:
        return GROUND
    layer = int((y - 17) // 3)
    if aside < width - 1.8 and y < 26 and 0 <= layer < len(TIERS):
        return TIERS[layer]
    return GLASS


def _is_on_ground(aside: float, apart: float) -> bool:
    corner, radius = SIZE / 2 - 7, 7
    across, along = max(aside - corner, 0), max(apart - corner, 0)
    return across**2 + along**2 <= radius**2


def _half_width(y: float) -> float:
    """Return half the width of the flask at this height, and a negative number above and below it."""
    if 5 <= y < 7:
        return 4.5
    if 7 <= y < 12:
        return 2.8
    if 12 <= y < 27:
        return 2.8 + (y - 12) * 0.55
    return -1
