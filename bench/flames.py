"""Flame graphs: where the app's workers spend their time, as py-spy sees it, drawn small.

py-spy draws as well, but its pictures are pages with a script, white, and ten times as large.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH = 1160
HEIGHT = 17
"""Of one frame."""

LEAST = 0.004
"""Of the whole: what is narrower is left out."""

LETTER = 6.6
"""Width of one, at font size 11."""

COLOURS = {
    "velikiy": "#f2b366",
    "psycopg": "#8fbf8f",
    "redis": "#e39a94",
    "flask": "#93b7dd",
    "werkzeug": "#93b7dd",
    "gunicorn": "#bcaed6",
}
OTHER = "#c9c9c9"
"""Python's own library, and all that is C."""


IDLE = ("queue.py", "threading.py", "sched.py", "selectors.py", "concurrent/futures/thread.py")
"""Where a thread waits that has no request: py-spy takes some of these for work."""


@dataclass
class Frame:
    name: str
    count: int = 0
    callees: dict[str, "Frame"] = field(default_factory=dict)

    def depth(self, least: float) -> int:
        return 1 + max((it.depth(least) for it in self.callees.values() if it.count >= least), default=0)


def record(workers: list[int], seconds: int, load: Callable[[], object]) -> str:
    """The stacks of these processes while there is load, one a line with how often it was met.

    Raises:
        RuntimeError: py-spy may not look into them; on many systems only root may.
    """
    program = str(Path(sys.executable).parent / "py-spy")
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / str(pid) for pid in workers]
        # 97 a second: not in step with anything that happens a hundred times a second.
        options = ["--rate", "97", "--format", "raw", "--function", "--duration", str(seconds)]
        loading = threading.Thread(target=load)
        loading.start()
        spies = [
            subprocess.Popen(
                [program, "record", "--pid", str(pid), *options, "--output", str(file)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for pid, file in zip(workers, files, strict=True)
        ]
        said = [spy.communicate()[1] for spy in spies]
        loading.join()
        if any(spy.returncode for spy in spies):
            raise RuntimeError(f"py-spy: {said[0].strip()}")
        return "".join(file.read_text() for file in files)


def tree(stacks: str) -> Frame:
    """Below what all threads have in common: how Python starts a thread is nobody's question."""
    root = Frame("all")
    for line in stacks.splitlines():
        names, _, count = line.rpartition(" ")
        called = [name for name in names.split(";") if "threading.py" not in name and not name.startswith("process ")]
        if not called or (is_idle(called[-1]) and not any("(velikiy/" in name for name in called)):
            continue
        frame = root
        frame.count += int(count)
        for name in called:
            frame = frame.callees.setdefault(name, Frame(name))
            frame.count += int(count)
    return root


def is_idle(name: str) -> bool:
    return any(f"({file}" in name or f"/{file}" in name for file in IDLE)


def draw(root: Frame, title: str) -> str:
    """The callers on top. A frame of its own colour on any page, so it can be read on a light and on a dark one."""
    least = LEAST * root.count
    height = HEIGHT * (root.depth(least) + 1) + 6
    shapes = "\n".join(_shapes(root, 0, 1, least, root.count))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace"'
        f' font-size="11">\n<text x="2" y="12" fill="#888888">{escape(title)}, {root.count} samples</text>\n'
        f"{shapes}\n</svg>\n"
    )


def _shapes(frame: Frame, left: float, row: int, least: float, whole: int) -> Iterator[str]:
    width = frame.count / whole * WIDTH
    top = row * HEIGHT + 4
    fill = next((colour for name, colour in COLOURS.items() if f"({name}" in frame.name), OTHER)
    hint = f"{escape(frame.name)}: {100 * frame.count / whole:.1f} %"
    yield (
        f'<rect x="{left:.1f}" y="{top}" width="{max(width - 0.5, 0.5):.1f}" height="{HEIGHT - 1}" fill="{fill}">'
        f"<title>{hint}</title></rect>"
    )
    room = int((width - 4) / LETTER)
    if room >= 4:
        # Short enough, the file is left out first.
        name = frame.name if len(frame.name) <= room else frame.name.partition(" (")[0][:room]
        yield f'<text x="{left + 2:.1f}" y="{top + 12}" fill="#111111" pointer-events="none">{escape(name)}</text>'
    for callee in sorted(frame.callees.values(), key=lambda it: it.name):
        if callee.count >= least:
            yield from _shapes(callee, left, row + 1, least, whole)
        left += callee.count / whole * WIDTH
