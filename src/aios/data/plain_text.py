"""Bytes to text: what is text at all, lines of bounded length, documents of a plain text."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from itertools import chain, groupby

from aios.data.sources import Tally
from chronomoe.errors import DataError

SEPARATOR = "<|endoftext|>"
WHOLE_TEXT = 64 * 1024
"""A text of up to this many characters is one document."""
PIECE = 16 * 1024
"""A longer one is cut at blank lines into documents of about this many."""
HEAD = 8 * 1024
"""Bytes from which it is judged whether a file is text."""
LONGEST_RECORD = 64 * 1024 * 1024
"""Characters that a line with a record, a row or a cell may have."""
LONGEST_LINE = 1024 * 1024 * 1024
"""Characters that a line of plain text may have."""
_SIGNATURES = {
    b"\x89PNG\r\n": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF87a": "a GIF picture",
    b"GIF89a": "a GIF picture", b"%PDF-": "a PDF", b"PK\x03\x04": "a zip archive or a document in one",
    b"\x1f\x8b\x08": "gzip data", b"BZh91AY&SY": "bzip2 data", b"\xfd7zXZ\0": "xz data", b"(\xb5/\xfd": "zstd data",
    b"\x7fELF": "a program", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"PAR1": "a parquet file",
    b"SQLite format 3\0": "a database",
}  # fmt: skip
_CONTROL = bytes({*range(32), 127} - set(b"\t\n\v\f\r\b\x1b"))
_FEW_BYTES, _MOST_NO_TEXT, _CONTROL_COUNTS = 16, 0.6, 10
# Natural text in any encoding has next to no control characters, and accents are less than half of it.


def why_no_text(head: bytes) -> str | None:
    """Why a file that begins with these bytes is no text; None when it is.

    UTF-8 of any script is text, and so is what is mostly ASCII in another encoding.
    """
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature) and (signature != b"PAR1" or b"\0" in head):
            return f"it is {kind}"
    if head[257:262] == b"ustar":
        return "it is a tar archive"
    if b"\0" in head:
        return "it holds NUL bytes; if it is UTF-16, save it as UTF-8"
    legible = codecs.getincrementaldecoder("utf-8")("ignore").decode(head)  # a character may be cut at the end
    control, illegible = len(head) - len(head.translate(None, _CONTROL)), len(head) - len(legible.encode())
    if control + illegible >= _FEW_BYTES and _CONTROL_COUNTS * control + illegible > _MOST_NO_TEXT * len(head):
        return "much of how it begins is not UTF-8; if it is text in another encoding, convert it"
    return None


def decoded(chunks: Iterable[bytes], tally: Tally) -> Iterator[str]:
    """UTF-8 text with newlines made uniform; what one decoder ignores and the other replaces is counted."""
    shown = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    kept = codecs.getincrementaldecoder("utf-8")("ignore")
    start = True
    for chunk in chain(chunks, [b""]):
        tally.replaced_bytes += len(chunk) - len(kept.decode(chunk, final=not chunk).encode())
        text = shown.decode(chunk, final=not chunk)
        yield text.removeprefix("\ufeff") if start else text
        start = False


def lines(pieces: Iterable[str], *, where: str, most: int, longest: int | None = None) -> Iterator[str]:
    """Lines with their newline; one longer than ``longest`` comes in several parts.

    Raises :class:`DataError` for a line of more than ``most`` characters.
    """
    waiting: list[str] = []
    size = given = 0  # of what waits, and of what was given of the same line
    number = 1
    for piece in pieces:
        *whole, tail = piece.split("\n")
        for line in whole:
            yield "".join([*waiting, line, "\n"])
            waiting, size, given = [], 0, 0
            number += 1
        waiting.append(tail)
        size += len(tail)
        if size + given > most:
            raise DataError(f"{where}, line {number} is longer than {most:,} characters; divide it or leave it out.")
        if longest and size > longest:
            rest = "".join(waiting)
            yield from (rest[start : start + longest] for start in range(0, size, longest))
            waiting, size, given = [], 0, given + size
    if size:
        yield "".join(waiting)


def text_documents(lines: Iterable[str]) -> Iterator[str]:
    """Documents of a plain text: its parts between separator lines, each cut up if it is long."""
    for is_separator, part in groupby(lines, key=lambda line: line.strip() == SEPARATOR):
        if is_separator:
            continue
        beginning, size, rest = [], 0, iter(part)
        for line in rest:
            beginning.append(line)
            size += len(line)
            if size > WHOLE_TEXT:
                yield from _cut(chain(beginning, rest))
                break
        else:
            yield "".join(beginning)


class Piece(str):
    """A piece of a text too long to be one document."""

    beginning: str
    """The first piece of that text, by which its pieces know each other."""


def _cut(lines: Iterable[str]) -> Iterator[Piece]:
    first: Piece | None = None
    for text in _pieces(lines):
        piece = Piece(text)
        first = first or piece
        piece.beginning = first
        yield piece


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    piece, size = [], 0
    for line in lines:
        piece.append(line)
        size += len(line)
        # A text without blank lines is cut at any line.
        if size >= PIECE and (line.isspace() or size >= PIECE * 3 // 2):
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def ascii_lines(text: str) -> str:
    """A document without lines that are not ASCII."""
    kept = "".join(line for line in text.splitlines(keepends=True) if line.isascii())
    if isinstance(text, Piece):
        piece = Piece(kept)
        piece.beginning = text.beginning
        return piece
    return kept
