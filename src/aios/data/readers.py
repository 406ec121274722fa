"""Sources of text and the documents in them, read as streams.

A source is a named file, folder, archive or data set; a document is a record, or a text, or a piece of a long text
(which knows its siblings, see split.py). Nothing here holds more than one.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path, PurePath
from typing import IO, Any, cast

from chronomoe.data.store_info import METADATA
from chronomoe.errors import ConfigError, DataError

SEPARATOR = "<|endoftext|>"
TEXT_FIELDS = ("text", "content", "document", "article", "body")
WHOLE_TEXT = 64 * 1024
"""A text of up to this many characters is one document."""
PIECE = 16 * 1024
"""A longer one is cut at blank lines into documents of about this many."""
_HEAD, _CHUNK = 8 * 1024, 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the text of a domain comes from."""

    name: str
    """The domain it belongs to; sources of the same name are one domain."""
    path: str
    """File, folder, .gz, .zip, .parquet, or hf:<data set>[:config][:split]."""
    weight: float | None = None
    """Share of training sequences, relative to the other sources; None: in proportion to its tokens."""
    held_out: bool = False
    """Evaluate on all of it, train on none."""


@dataclass(kw_only=True)
class Tally:
    """What reading came across, counted as it goes."""

    files: int = 0
    """Text files read."""
    binaries_skipped: int = 0
    """Files passed over because they are not text."""
    replaced_bytes: int = 0
    """Bytes that were not UTF-8, read as replacement characters."""


def parse_source(spec: str) -> Source:
    """Read `[name=]path[:weight]`; a path that exists is taken whole, whatever characters it holds."""
    name, equals, rest = spec.partition("=")
    if not equals or os.path.exists(spec):
        name, rest = "", spec
    elif not _NAME.fullmatch(name):
        raise ConfigError(f"The name {name!r} in source {spec!r} must be 1 to 64 letters, digits, '_' or '-'.")
    if not os.path.exists(rest):
        rest = os.path.expanduser(rest)  # the shell leaves `name=~/text` alone
    weight = None
    path, _, number = rest.rpartition(":")
    if path and not os.path.exists(rest) and re.fullmatch(r"[0-9]*\.?[0-9]+", number):
        rest, weight = path, float(number)
    if not rest:
        raise ConfigError(f"Source {spec!r} names no path; write it as name=path or name=path:weight.")
    return Source(name=name or _default_name(rest), path=rest, weight=weight)


def _default_name(path: str) -> str:
    plain = PurePath(path.removeprefix("hf:").replace("\\", "/")).name or Path(path).resolve().name
    stem = plain.lstrip(".").split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:64] or "data"


def read_documents(
    source: Source, *, field: str | None = None, tally: Tally | None = None, ascii_only: bool = False
) -> Iterator[str]:
    """Every document of a source that is not blank, without lines that are not ASCII if asked.

    Raises :class:`DataError` when there is none.
    """
    tally, found, path = tally or Tally(), False, source.path
    try:
        for text in _source_documents(path, field, tally):
            if ascii_only and not text.isascii():
                text = _ascii_lines(text)
            if text and not text.isspace():
                found = True
                yield text
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is a damaged or unsupported archive: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not found:
        skipped = f" ({tally.binaries_skipped} binary files skipped)" if tally.binaries_skipped else ""
        raise DataError(
            f"{path} holds no {'ASCII ' if ascii_only else ''}text{skipped}; name a file or folder that does."
        )


def _ascii_lines(text: str) -> str:
    kept = "".join(line for line in text.splitlines(keepends=True) if line.isascii())
    if isinstance(text, Piece):
        piece = Piece(kept)
        piece.beginning = text.beginning
        return piece
    return kept


def _source_documents(path: str, field: str | None, tally: Tally) -> Iterator[str]:
    if path.startswith("hf:"):
        yield from _data_set_documents(path, field)
    elif os.path.isdir(path):
        for file in _visible_files(path):
            yield from _file_documents(file, field, tally, in_folder=True)
    elif os.path.exists(path):
        yield from _file_documents(path, field, tally, in_folder=False)
    else:
        raise DataError(f"There is no file or folder {path}; check the spelling.")


def _visible_files(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        if METADATA in files and "tokenizer" in folders:  # prepared data, not text
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from filter(os.path.isfile, paths)  # not links to nowhere, nor sockets


def _file_documents(path: str, field: str | None, tally: Tally, *, in_folder: bool) -> Iterator[str]:
    if path.lower().endswith(".parquet"):
        yield from _data_set_documents(path, field)
        return
    with open(path, "rb") as file:
        if path.lower().endswith(".zip"):
            yield from _zip_documents(path, file, field, tally)
        else:
            yield from _stream_documents(path, file, field, tally, skip_binary=in_folder)


def _zip_documents(path: str, file: IO[bytes], field: str | None, tally: Tally) -> Iterator[str]:
    with zipfile.ZipFile(file) as archive:
        for member in sorted(archive.infolist(), key=lambda info: info.filename):
            hidden = any(part.startswith((".", "__MACOSX")) for part in PurePath(member.filename).parts)
            if member.is_dir() or hidden:
                continue
            if member.flag_bits & 1:
                raise DataError(f"{path} is encrypted; unpack it first.")
            with archive.open(member) as stream:
                where = f"{path}:{member.filename}"
                yield from _stream_documents(where, stream, field, tally, skip_binary=True)


def _stream_documents(
    where: str, stream: IO[bytes], field: str | None, tally: Tally, *, skip_binary: bool
) -> Iterator[str]:
    if where.lower().endswith(".gz"):
        with gzip.open(stream) as inner:
            yield from _stream_documents(where[:-3], cast(IO[bytes], inner), field, tally, skip_binary=skip_binary)
        return
    head = stream.read(_HEAD)
    if b"\0" in head:
        if not skip_binary:
            raise DataError(f"{where} is not text (it holds NUL bytes); if it is UTF-16, save it as UTF-8.")
        tally.binaries_skipped += 1
        return
    tally.files += 1
    pieces = _decoded(chain([head], iter(lambda: stream.read(_CHUNK), b"")), tally)
    suffix = PurePath(where).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_documents(where, _lines(pieces), field)
    elif suffix in (".csv", ".tsv"):
        yield from _table_documents(where, _lines(pieces), field, "," if suffix == ".csv" else "\t")
    else:
        yield from text_documents(_lines(pieces, longest=PIECE))


def _decoded(chunks: Iterable[bytes], tally: Tally) -> Iterator[str]:
    """UTF-8 text with newlines made uniform; what one decoder ignores and the other replaces is counted."""
    shown = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    kept = codecs.getincrementaldecoder("utf-8")("ignore")
    start = True
    for chunk in chain(chunks, [b""]):
        tally.replaced_bytes += len(chunk) - len(kept.decode(chunk, final=not chunk).encode())
        text = shown.decode(chunk, final=not chunk)
        yield text.removeprefix("\ufeff") if start else text
        start = False


def _lines(pieces: Iterable[str], longest: int | None = None) -> Iterator[str]:
    """Lines with their newline; one longer than `longest` comes in several parts."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        *whole, tail = piece.split("\n")
        for line in whole:
            yield "".join([*waiting, line, "\n"])
            waiting, size = [], 0
        waiting.append(tail)
        size += len(tail)
        if longest and size > longest:
            rest = "".join(waiting)
            yield from (rest[start : start + longest] for start in range(0, size, longest))
            waiting, size = [], 0
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


def _json_documents(where: str, lines: Iterable[str], field: str | None) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, line {number} is not JSON ({error}); mend or remove it.") from error
        if isinstance(record, dict):
            record = record[_field(list(record), field, f"{where}, line {number}")]
        if not isinstance(record, str):
            raise DataError(f"{where}, line {number} holds no text there; choose a text field with --field.")
        # JSON can spell half a surrogate pair, which no tokenizer can encode.
        yield record.encode("utf-8", "replace").decode()


def _table_documents(where: str, lines: Iterable[str], field: str | None, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    rest = iter(lines)
    header = next(rest, "")
    if delimiter == "," and "," not in header and ";" in header:
        delimiter = ";"  # as spreadsheets write it where the comma is in numbers
    rows = csv.DictReader(chain([header], rest), delimiter=delimiter)
    try:
        if rows.fieldnames is None:
            return
        column = _field(list(rows.fieldnames), field, where, candidates=TEXT_FIELDS[:1])
        for row in rows:
            yield row[column] or ""
    except csv.Error as error:
        raise DataError(f"{where}, line {rows.line_num} is not a table row ({error}); mend or remove it.") from error


def _field(names: list[str], field: str | None, where: str, candidates: Sequence[str] = TEXT_FIELDS) -> str:
    for candidate in [field] if field else candidates:
        if candidate in names:
            return candidate
    missing = f"no field {field!r}" if field else "no obvious text field"
    raise DataError(f"{where} has {missing}; choose one of {', '.join(map(repr, names))} with --field.")


def _data_set_documents(path: str, field: str | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"Reading {path} needs the optional package datasets: pip install datasets.") from None
    name, config, split, *_ = [*path.removeprefix("hf:").lstrip("/").split(":"), None, None]
    settings: dict[str, Any] = {"path": name, "name": config, "split": split or "train"}
    if not path.startswith("hf:"):
        settings = {"path": "parquet", "data_files": path, "split": "train"}
    try:
        for record in datasets.load_dataset(**settings, streaming=True):
            yield str(record[_field(list(record), field, path)] or "")
    except DataError:
        raise
    except Exception as error:  # whatever the network, the hub or a file format may raise
        raise DataError(f"{path} cannot be loaded: {error}") from error
