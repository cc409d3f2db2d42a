"""Open the file that is imported, out of its container: gzip, bzip2, xz and zip, recognised by content."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, cast

from velikiy.bulk.input_file import BEGINNING_BYTES, BOM, CannotImport, peek

MAX_LAYERS = 3
"""Containers within each other, such as a .csv.gz in a zip archive."""

MAGIC_BYTES = 512
"""Bytes that show what a file is. The latest sign is that of tar, at byte 257."""

SPREADSHEET = "save the sheet as CSV (in Excel: Save As, CSV UTF-8) and import that file"

UNREADABLE = (
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first: zstd -d FILE"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it first: lz4 -d FILE"),
    (b"\x1f\x9d", "compressed with compress (.Z)", "unpack it first: gzip -d FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x FILE"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first: unrar x FILE"),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an old or protected Excel workbook, or another Office document",
        SPREADSHEET,
    ),
    (b"%PDF-", "a PDF", "export a table as CSV from the program that made it"),
    (b"SQLite format 3\0", "an SQLite database", "export the table as CSV: sqlite3 -csv -header FILE 'SELECT ...'"),
    (b"PAR1", "a Parquet file", "convert it to CSV or NDJSON"),
    (b"Obj\x01", "an Avro file", "convert it to CSV or NDJSON"),
    (b"{\\rtf", "a text with formatting (RTF)", "save it as plain text"),
    (b"BEGIN:VCARD", "a vCard file", "export the contacts as CSV"),
    (b"PGDMP", "a dump of pg_dump", "restore it with velikiy restore"),
)
"""Beginnings of files that are no table: what the file is, and what to do."""

DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile)


@contextmanager
def open_input(file: str) -> Iterator[tuple[io.FileIO, io.BufferedReader, bytes]]:
    """Yield the file, its uncompressed content as a stream, and the beginning of that content."""
    with open(0 if file == "-" else file, "rb", buffering=0, closefd=file != "-") as raw:
        start, stream = peek(raw, MAGIC_BYTES)
        for layer in range(MAX_LAYERS):
            if (inner := _unpacked(start, stream, raw if layer == 0 else None)) is None:
                break
            start, stream = peek(inner, MAGIC_BYTES)
        refuse_other_kinds(start)
        beginning, content = peek(stream, BEGINNING_BYTES)
        yield raw, content, beginning


def _unpacked(start: bytes, stream: io.BufferedReader, raw: io.FileIO | None) -> Any:
    """Return the content of a container, or None if the stream is no container.

    Args:
        start: The first bytes of the stream.
        raw: The file on the disk if the stream is its beginning, else None.

    Raises:
        CannotImport
    """
    if start.startswith(b"\x1f\x8b"):
        return _Unpacked(gzip.GzipFile(fileobj=stream))
    if start.startswith(b"BZh"):
        return _Unpacked(bz2.BZ2File(stream))
    if start.startswith(b"\xfd7zXZ\0"):
        return _Unpacked(lzma.LZMAFile(stream))
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _member(stream, raw)
    return None


def refuse_other_kinds(start: bytes) -> None:
    """Raise CannotImport if content that begins so is no table."""
    text = start.removeprefix(BOM).lstrip()
    for magic, kind, advice in UNREADABLE:
        if start.startswith(magic) or text.startswith(magic):
            raise CannotImport(f"the file is {kind}: {advice}")
    if start[257:262] == b"ustar":
        raise CannotImport("the file is a tar archive: unpack it first: tar -xf FILE")
    if text[:1] == b"<":
        kind = "a web page (HTML)" if b"<html" in text.lower() or b"<!doctype" in text.lower() else "XML"
        raise CannotImport(f"the file is {kind}, and not CSV or JSON: export the table in one of these formats")
    if text.startswith(b"dn: ") or (text.startswith(b"version: 1") and b"\ndn: " in text):
        raise CannotImport("the file is LDIF: export the entries as CSV")


def _member(stream: io.BufferedReader, raw: io.FileIO | None) -> "_Unpacked":
    """Return the content of the only file in a zip archive."""
    source: Any = raw
    if raw is None or not raw.seekable():
        # The directory of an archive is at its end, and a pipe cannot be rewound. The copy has no name, and ends with
        # the process.
        source = tempfile.TemporaryFile()  # noqa: SIM115 (the returned stream reads it)
        _Unpacked(stream).copy_to(source)
    try:
        archive = zipfile.ZipFile(source)
        files = [info for info in archive.infolist() if not _is_beside_the_point(info.filename)]
        _refuse_documents(archive)
        if len(files) == 1:
            return _Unpacked(archive.open(files[0]))
    except (zipfile.BadZipFile, EOFError) as error:
        raise CannotImport(f"the compressed file is damaged or truncated: {error}") from None
    except (RuntimeError, NotImplementedError):
        raise CannotImport("the zip archive is encrypted or compressed in an unusual way: unpack it first") from None
    if not files:
        raise CannotImport("the file is a zip archive without a file in it")
    raise CannotImport(
        f"the file is a zip archive with {len(files):,} files: {_listed(info.filename for info in files)}. Choose a"
        f" file and pipe it in: unzip -p FILE {files[0].filename} | ./run velikiy ... import -"
    )


def _is_beside_the_point(name: str) -> bool:
    """Return True for a folder, and for a file that macOS adds."""
    return name.endswith("/") or name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith(".")


def _refuse_documents(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if any(name.startswith("xl/") for name in names):
        raise CannotImport(f"the file is an Excel workbook: {SPREADSHEET}")
    if "mimetype" in names and archive.read("mimetype")[:100].startswith(b"application/vnd.oasis.opendocument"):
        raise CannotImport(f"the file is an OpenDocument file: {SPREADSHEET}")
    if any(name.endswith(".iwa") for name in names):
        raise CannotImport("the file is a Numbers document: export the table as CSV and import that file")
    if "[Content_Types].xml" in names:
        raise CannotImport("the file is an Office document, and no table: save the table as CSV and import that file")


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class _Unpacked(io.RawIOBase):
    """A stream whose damage is reported as a sentence for the operator."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return cast("int", self._stream.readinto(buffer))
        except DAMAGE as error:
            raise _damaged(error) from None
        except OSError as error:
            if error.errno is None:  # bz2's only exception
                raise _damaged(error) from None
            raise

    def copy_to(self, target: Any) -> None:
        shutil.copyfileobj(self, target, 1 << 20)


def _damaged(error: Exception) -> CannotImport:
    return CannotImport(f"the compressed file is damaged or truncated: {error}")
