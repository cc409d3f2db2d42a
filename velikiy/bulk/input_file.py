"""The basis of the modules that read a file: the refusal, the formats by name, and looking ahead in a stream."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGINNING_BYTES = 1 << 20
"""Bytes, uncompressed, whose digest identifies a file, and which decide how it is read."""

FORMATS = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}

BOM = b"\xef\xbb\xbf"


class CannotImport(Exception):
    """The reason why a file cannot be imported, or not to its end, as a sentence for the operator."""

    def __init__(self, sentence: str, advice: str = "", *, option: str = "") -> None:
        """
        Args:
            sentence: What is wrong, without words of the command line: the console shows it, too.
            advice: What to do at the command line, with the sign before it, such as ": leave out --encoding".
            option: The option at fault, such as "--encoding ", which stands before the sentence.
        """
        super().__init__(option + sentence + advice)
        self.sentence = sentence


class WrongColumns(CannotImport):
    """The columns of a file are not those of the resource: some must be chosen, or left out."""

    def __init__(self, names: Sequence[str], sentence: str, advice: str = "") -> None:
        super().__init__(sentence, advice)
        self.names = names
        """The columns of the file."""


def format_by_name(file: str) -> str | None:
    """Return the format that the name of the file implies, or None."""
    return FORMATS.get(Path(file.lower().removesuffix(".gz")).suffix)


def peek(stream: Any, size: int) -> tuple[bytes, io.BufferedReader]:
    """Return the first bytes, and a stream with all of the content. A pipe cannot be rewound."""
    beginning = b""
    while len(beginning) < size and (more := stream.read(size - len(beginning))):
        beginning += more
    return beginning, io.BufferedReader(_Concatenated(io.BytesIO(beginning), stream), 1 << 17)


class _Concatenated(io.RawIOBase):
    """Several streams, read one after the other."""

    def __init__(self, *streams: Any) -> None:
        self.streams = list(streams)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.streams:
            if size := self.streams[0].readinto(buffer):
                return int(size)
            del self.streams[0]
        return 0
