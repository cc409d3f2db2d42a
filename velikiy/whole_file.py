"""Replace a file as a whole: no reader and no full disk meets half of it, and no power failure an empty file."""

import os
from pathlib import Path


def replace(file: Path, text: str, *, mode: int | None = None, group: int | None = None, durable: bool = True) -> None:
    """Write the text into a new file, which then gets the name of the file.

    Args:
        file: The file, which need not exist.
        text: Its new content.
        mode: Its permissions, also while it is written. None leaves them to the umask.
        group: The id of its group. None leaves it to the folder.
        durable: Write it to the disk before it gets its name. A file that each start writes again needs no such care.

    Raises:
        OSError: The file is as it was.
    """
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    if mode is not None:
        new.touch(0o600)
    with new.open("w") as output:
        output.write(text)
        if group is not None:
            os.chown(new, -1, group)
        if mode is not None:
            new.chmod(mode)
        output.flush()
        if durable:
            os.fsync(output.fileno())
    new.replace(file)
