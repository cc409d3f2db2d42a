"""Draw small flame graphs of the app's workers, from the stacks that py-spy samples.

py-spy also draws flame graphs, but each is a page with a script, on white, and ten times as large.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH_PX = 1160
FRAME_HEIGHT_PX = 17
"""Height of a frame."""

MIN_SHARE = 0.004
"""Share of all samples. A narrower frame is left out."""

LETTER_WIDTH_PX = 6.6
"""Width of a letter at font size 11."""

COLOURS = {
    "velikiy": "#f2b366",
    "psycopg": "#8fbf8f",
    "redis": "#e39a94",
    "flask": "#93b7dd",
    "werkzeug": "#93b7dd",
    "gunicorn": "#bcaed6",
}
OTHER_COLOUR = "#c9c9c9"
"""Python's standard library, and everything in C."""


IDLE = ("queue.py", "threading.py", "sched.py", "selectors.py", "concurrent/futures/thread.py")
"""Files in which a thread without a request waits. py-spy counts some of these waits as work."""


@dataclass
class Frame:
    name: str
    count: int = 0
    callees: dict[str, "Frame"] = field(default_factory=dict)

    def depth(self, min_count: float) -> int:
        visible = [it for it in self.callees.values() if it.count >= min_count]
        return 1 + max((it.depth(min_count) for it in visible), default=0)


def record(workers: list[int], seconds: int, load: Callable[[], object]) -> str:
    """Return the stacks of these processes under load, each on a line with the number of its samples.

    Raises:
        RuntimeError: py-spy may not read the processes; on many systems only root may.
    """
    program = str(Path(sys.executable).parent / "py-spy")
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / str(pid) for pid in workers]
        # 97 samples a second: out of step with everything that happens a hundred times a second.
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
        errors = [spy.communicate()[1] for spy in spies]
        loading.join()
        if any(spy.returncode for spy in spies):
            raise RuntimeError(f"py-spy: {errors[0].strip()}")
        return "".join(file.read_text() for file in files)


def tree(stacks: str) -> Frame:
    """Build the tree of calls, without the frames that start a thread, and without idle threads."""
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
    """Draw the tree, callers on top. Frames have a colour of their own on any page, light or dark."""
    min_count = MIN_SHARE * root.count
    height = FRAME_HEIGHT_PX * (root.depth(min_count) + 1) + 6
    shapes = "\n".join(_shapes(root, 0, 1, min_count, root.count))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {height}" font-family="monospace"'
        f' font-size="11">\n<text x="2" y="12" fill="#888888">{escape(title)}, {root.count} samples</text>\n'
        f"{shapes}\n</svg>\n"
    )


def _shapes(frame: Frame, left: float, row: int, min_count: float, total: int) -> Iterator[str]:
    width = frame.count / total * WIDTH_PX
    top = row * FRAME_HEIGHT_PX + 4
    fill = next((colour for name, colour in COLOURS.items() if f"({name}" in frame.name), OTHER_COLOUR)
    hint = f"{escape(frame.name)}: {100 * frame.count / total:.1f} %"
    yield (
        f'<rect x="{left:.1f}" y="{top}" width="{max(width - 0.5, 0.5):.1f}" height="{FRAME_HEIGHT_PX - 1}"'
        f' fill="{fill}">'
        f"<title>{hint}</title></rect>"
    )
    room = int((width - 4) / LETTER_WIDTH_PX)
    if room >= 4:
        # A name that is too long is shown without its file.
        name = frame.name if len(frame.name) <= room else frame.name.partition(" (")[0][:room]
        yield f'<text x="{left + 2:.1f}" y="{top + 12}" fill="#111111" pointer-events="none">{escape(name)}</text>'
    for callee in sorted(frame.callees.values(), key=lambda it: it.name):
        if callee.count >= min_count:
            yield from _shapes(callee, left, row + 1, min_count, total)
        left += callee.count / total * WIDTH_PX
