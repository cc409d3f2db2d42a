"""The encoding of a text: given, certain, or guessed for a hint. No guess is used to read a file."""

import codecs
import io
import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from velikiy.bulk.input_file import BEGINNING_BYTES, CannotImport, peek

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is the first half of this mark
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

SAMPLE_BYTES = 1 << 16

CANDIDATES = {
    "cp1252": "windows-1252",
    "cp1251": "windows-1251",
    "cp1250": "windows-1250",
    "cp1253": "windows-1253",
    "cp1254": "windows-1254",
    "cp1255": "windows-1255",
    "cp1256": "windows-1256",
    "cp1257": "windows-1257",
    "koi8_r": "koi8-r",
    "cp866": "cp866",
    "cp850": "cp850",
    "mac_roman": "macintosh",
    "mac_cyrillic": "mac-cyrillic",
    "cp932": "cp932",
    "euc_jp": "euc-jp",
    "gb18030": "gb18030",
    "big5": "big5",
    "cp949": "cp949",
}
"""The encodings in which people have files, with the names that people know. Where two read a text alike, the first is
named. A longer list makes the guesses worse: in a short text every encoding finds letters."""

MAX_HINTS = 3

codecs.register_error("mark-invalid", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class Encoding:
    """An encoding, and whether the text has proven it."""

    def __init__(self, codec: str, label: str, is_proven: bool) -> None:
        """
        Args:
            codec: A codec of Python in which a line ends with the byte 10.
            label: The name in sentences.
            is_proven: Text beyond ASCII has already been read.
        """
        self.codec = codec
        self.label = label
        self.is_proven = is_proven

    def refusal(self, sample: bytes, number: int, error: UnicodeDecodeError) -> CannotImport:
        """Return the refusal of a text of which nothing beyond ASCII can be read, with a hint."""
        hints = list(_hints(sample))[:MAX_HINTS]
        where = f"the file is not {self.label} (line {number:,}, byte 0x{error.object[error.start]:02x})"
        if not hints:
            return CannotImport(where, ": name its encoding with --encoding, such as --encoding windows-1252")
        (name, reading), *others = hints
        if not others:
            return CannotImport(f"{where}. It looks like {name} ({reading!r})", f": add --encoding {name}")
        also = ", or like ".join(f"{name} ({reading!r})" for name, reading in hints)
        return CannotImport(
            f"{where}. It looks like {also}", f": add --encoding {name}, or the name of the one that reads well"
        )


def as_readable(
    content: io.BufferedReader, beginning: bytes, given: str | None
) -> tuple[io.BufferedReader, bytes, Encoding]:
    """Return the content in an encoding that can be read line by line, its beginning, and that encoding.

    Raises:
        CannotImport: The encoding is unknown, or the beginning is in another encoding.
    """
    codec = certain(beginning)
    marked = codec if any(beginning.startswith(mark) for mark, _ in BYTE_ORDER_MARKS) else None
    if given:
        chosen = codec_of(given)
        if marked and not marked.startswith(chosen.removesuffix("-sig")):
            raise CannotImport(
                f"the file begins with the byte order mark of {marked[:6].upper()}", ": leave out --encoding"
            )
        codec = marked or chosen.removesuffix("-sig")
    codec = codec or "utf-8"
    label = codec.upper() if codec == "utf-8" else given or codec[:6].upper()
    if "\r\n".encode(codec) != b"\r\n":
        beginning, content = peek(_Transcoded(content, codec), BEGINNING_BYTES)
        return content, beginning, Encoding("utf-8", label, is_proven=True)
    encoding = Encoding(codec, label, is_proven=False)
    encoding.is_proven = _is_proven(encoding, beginning)
    if codec != "utf-8" and not beginning.isascii() and _is_single_byte(codec) and _decodes(beginning, "utf-8"):
        raise CannotImport(f"the file is UTF-8, and not {given}", ": leave out --encoding")
    return content, beginning, encoding


def codec_of(name: str) -> str:
    """Return Python's name of an encoding.

    Raises:
        CannotImport
    """
    try:
        found = codecs.lookup(name)
        "name".encode(found.name)  # some codecs do not encode text
        bytes(4).decode(found.name)
    except (LookupError, ValueError, TypeError):
        found = None
    if found is None or not getattr(found, "_is_text_encoding", True) or "escape" in found.name or found.name == "idna":
        raise CannotImport(
            f"{name}: no encoding has this name. Examples: utf-16, windows-1251, windows-1252, koi8-r, shift_jis,"
            " gb18030",
            option="--encoding ",
        )
    return found.name


def certain(beginning: bytes) -> str | None:
    """Return the encoding that a byte order mark or the zero bytes of UTF-16 and UTF-32 prove, or None."""
    for mark, codec in BYTE_ORDER_MARKS:
        if beginning.startswith(mark):
            return codec
    sample = beginning[:SAMPLE_BYTES]
    if b"\0" not in sample:
        return None
    for codec, place in (("utf-32-le", slice(3, None, 4)), ("utf-32-be", slice(0, None, 4))):
        if len(sample) >= 8 and not any(sample[place]) and _decodes(sample, codec):
            return codec
    first, second = sample[0::2].count(0), sample[1::2].count(0)
    # Separators, line ends and the @ of addresses are ASCII in every language: a fifth of a table at least. A few other
    # characters have a zero byte at the other place, such as the Chinese "one".
    codec, most, least = ("utf-16-be", first, second) if first > second else ("utf-16-le", second, first)
    is_wide = most >= 4 and most * 10 >= len(sample) and least * 5 <= most and _decodes(sample, codec)
    return codec if is_wide else None


def _decodes(sample: bytes, codec: str) -> bool:
    """Return True if a text is valid and has no NUL. It may end within a character."""
    try:
        return "\0" not in codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return False


def _is_single_byte(codec: str) -> bool:
    """Return True if each byte is a character. Text in such an encoding is never valid UTF-8 by accident."""
    return len(bytes(range(0x80, 0x100)).decode(codec, "replace")) == 0x80


def _is_proven(encoding: Encoding, beginning: bytes) -> bool:
    """Return whether the beginning has lines beyond ASCII that are valid.

    Raises:
        CannotImport: More lines are invalid than valid: the text is in another encoding. If fewer are, only these lines
            are damaged, and their rows are rejected.
    """
    if encoding.codec == "utf-8" and b"\x1b$" in beginning:
        raise CannotImport("the file is not UTF-8. It looks like iso-2022-jp", ": add --encoding iso-2022-jp")
    try:
        return not codecs.getincrementaldecoder(encoding.codec)().decode(beginning).isascii()
    except UnicodeDecodeError:
        pass
    valid: int = 0
    invalid: list[tuple[int, bytes, UnicodeDecodeError]] = []
    lines = re.split(rb"\r\n|\n|\r", beginning)
    if len(beginning) >= BEGINNING_BYTES and len(lines) > 1:
        del lines[-1]  # which may end within a character
    for number, line in enumerate(lines, start=1):
        try:
            valid += not line.decode(encoding.codec).isascii()
        except UnicodeDecodeError as error:
            invalid.append((number, line, error))
    if len(invalid) > valid:
        if re.search(rb"[\0-\x08\x0e-\x1a]", beginning):
            raise CannotImport("the file is not text, and neither CSV nor JSON")
        number, _, first = invalid[0]
        raise encoding.refusal(b"\n".join(line for _, line, _ in invalid), number, first) from None
    return valid > 0


def _hints(sample: bytes) -> Iterator[tuple[str, str]]:
    """Yield likely encodings of lines beyond ASCII, best first, each with a name as it would read."""
    from charset_normalizer import from_bytes  # takes 50 ms to load, and few files need a guess

    sample = sample[:SAMPLE_BYTES]
    # The words alone: addresses are ASCII in every encoding, and would count for each.
    words = re.findall(rb"[A-Za-z'. -]*[\x80-\xff][^;,\t|\"\r\n]*", sample)
    if not words:
        return
    readings: dict[str, str] = {}
    for match in from_bytes(b"\n".join(words), cp_isolation=list(CANDIDATES)):
        text = _read(b"\n".join(words), match.encoding)
        if text is not None and text not in readings and not _is_unlikely(text):
            readings[text] = match.encoding
    # A name begins with a capital where the script has capitals. The sort keeps the order of the library otherwise.
    for text in sorted(readings, key=str.islower):
        codec = next(codec for codec in (*CANDIDATES, readings[text]) if _read(b"\n".join(words), codec) == text)
        yield CANDIDATES.get(codec, codec), words[0].decode(codec, "replace").strip()[:30]


def _read(sample: bytes, codec: str) -> str | None:
    try:
        return codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return None


def _is_unlikely(text: str) -> bool:
    """Return True if a tenth of the words beyond ASCII are no words: a wrong encoding makes such text.

    They contain signs, mix Latin with other letters, have a capital after a small letter, or half-width letters.
    """
    words = [word for word in re.findall(r"[^\s'.-]+", text[:4000]) if not word.isascii()]
    return sum(map(_is_no_word, words)) * 10 > len(words)


def _is_no_word(word: str) -> bool:
    names = [unicodedata.name(letter, "") for letter in word if unicodedata.category(letter)[0] != "M"]
    return (
        not all(letter.isalpha() or unicodedata.category(letter)[0] == "M" for letter in word)
        or len({name.startswith("LATIN") for name in names}) > 1
        or any(name.startswith("HALFWIDTH") for name in names)
        or any(first.islower() and second.isupper() for first, second in itertools.pairwise(word))
    )


class _Transcoded(io.RawIOBase):
    """UTF-8 out of an encoding such as UTF-16. Invalid text stays invalid."""

    def __init__(self, stream: io.BufferedReader, codec: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(codec)("mark-invalid")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        is_at_end = False
        while not self._ready and not is_at_end:
            data = self._stream.read1(SAMPLE_BYTES)
            is_at_end = not data
            self._ready = self._decoder.decode(data, final=is_at_end).encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


class CrAsLf(io.RawIOBase):
    """Lines that end with CR, as old Macs write them, with LF instead."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read1(len(buffer)).replace(b"\r", b"\n")
        buffer[: len(data)] = data
        return len(data)
