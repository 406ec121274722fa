"""The documents of a source, read as streams.

A source is a named file, folder, archive or data set; a document is a record, or a text, or a piece of a long text
(which knows its siblings, see split.py). Nothing here holds more than one. What a name ends in says how a file is read.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import PurePath
from typing import IO

from aios.data.columns import data_set_documents, parquet_documents
from aios.data.plain_text import (
    HEAD,
    LONGEST_LINE,
    LONGEST_RECORD,
    PIECE,
    ascii_lines,
    decoded,
    lines,
    text_documents,
    why_no_text,
)
from aios.data.records import json_documents
from aios.data.sources import FlagNeededError, PackageNeededError, Source, Tally, files_below, why_no_file
from aios.data.tables import table_documents
from aios.data.unpacking import SUFFIXES, Allowance, Stream, bounded, damage_named, unpacked
from aios.settings.data import Reading
from chronomoe.errors import DataError

_CHUNK = 64 * 1024


def read_documents(source: Source, reading: Reading | None = None, tally: Tally | None = None) -> Iterator[str]:
    """Every document of a source that is not blank.

    Raises :class:`DataError` when there is none, naming the file that is to blame where there is one.
    """
    reading, tally, found, path = reading or Reading(), tally or Tally(), False, source.path
    for text in _Reader(reading, tally).source(path):
        if reading.ascii_only and not text.isascii():
            text = ascii_lines(text)
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        kind = "ASCII text" if reading.ascii_only else "text"
        left_out = f" ({'; '.join(tally.left_out)})" if tally.left_out else ""
        raise DataError(f"{path} holds no {kind}{left_out}; name a file or folder that does.")


class _Reader:
    def __init__(self, reading: Reading, tally: Tally) -> None:
        self.reading, self.tally = reading, tally

    def source(self, path: str) -> Iterator[str]:
        if path.startswith("hf:"):
            yield from data_set_documents(path, self.reading.field)
        elif os.path.isdir(path):
            for file in files_below(path, self.tally):
                yield from self.member(file, partial(_Reader.file, path=file, among_others=True))
        elif (why := why_no_file(path)) is None:
            yield from self.file(path, among_others=False)
        elif path == "-":
            raise DataError("Preparing reads text twice, and standard input can be read but once; save it in a file.")
        elif os.path.lexists(path):
            raise DataError(f"{path} {why}.")
        else:
            raise DataError(f"There is no file or folder {path}; check the spelling.")

    def member(
        self, where: str, documents: Callable[[_Reader], Iterator[str]], allowance: Allowance | None = None
    ) -> Iterator[str]:
        """One of several files: if it is damaged, it may be left out as a whole, so it is read through before."""
        if where in self.tally.damaged:
            return
        if self.reading.skip_damaged:
            try:
                with nullcontext() if allowance is None else allowance.lent():
                    for _ in documents(_Reader(self.reading, Tally())):
                        pass
            except PackageNeededError:
                raise
            except DataError as error:
                self.tally.damaged.add(where)
                self.tally.leave_out(error.problem if isinstance(error, FlagNeededError) else str(error).rstrip("."))
                return
        try:
            yield from documents(self)
        except (FlagNeededError, PackageNeededError):
            raise
        except DataError as error:
            raise FlagNeededError(str(error).rstrip("."), "--skip-damaged leaves such files out") from error

    def file(self, path: str, *, among_others: bool) -> Iterator[str]:
        with damage_named(path):
            if path.lower().endswith(".parquet"):
                yield from parquet_documents(path, self.reading.field)
                return
            with open(path, "rb") as file:
                allowance = Allowance(path, os.fstat(file.fileno()).st_size)
                if path.lower().endswith(".zip"):
                    yield from self.zipped(path, file, allowance)
                else:
                    yield from self.stream(path, path, file, allowance, among_others=among_others)

    def zipped(self, path: str, file: IO[bytes], allowance: Allowance) -> Iterator[str]:
        with _opened_zip(file) as archive:
            for member in sorted(archive.infolist(), key=lambda info: info.filename):
                hidden = any(part.startswith((".", "__MACOSX")) for part in PurePath(member.filename).parts)
                if member.is_dir() or hidden:
                    continue
                if member.flag_bits & 1:
                    raise DataError(f"{path} is encrypted; unpack it first.")
                where = f"{path}:{member.filename}"

                def documents(reader: _Reader, member: zipfile.ZipInfo = member, where: str = where) -> Iterator[str]:
                    with damage_named(where), archive.open(member) as stream:
                        packed = bounded(stream, allowance)
                        yield from reader.stream(where, where, packed, allowance, among_others=True)

                yield from self.member(where, documents, allowance)

    def stream(
        self, where: str, name: str, stream: Stream, allowance: Allowance, *, among_others: bool
    ) -> Iterator[str]:
        """Documents of a stream; ``name`` says what it is, which of a compressed file is what is left of its name."""
        suffix = PurePath(name).suffix.lower()
        if suffix in SUFFIXES:
            inner = unpacked(name, stream, allowance)
            yield from self.stream(where, name[: -len(suffix)], inner, allowance, among_others=among_others)
            return
        head = stream.read(HEAD)
        if (why := why_no_text(head)) is not None:
            if not among_others:
                raise DataError(f"{where} is not text: {why}.")
            self.tally.leave_out(f"{where} is not text: {why}")
            return
        self.tally.files += 1
        pieces = decoded(chain([head], iter(lambda: stream.read(_CHUNK), b"")), self.tally)
        if suffix in (".jsonl", ".ndjson"):
            yield from json_documents(where, lines(pieces, where=where, most=LONGEST_RECORD), self.reading.field)
        elif suffix in (".csv", ".tsv"):
            rows = lines(pieces, where=where, most=LONGEST_RECORD)
            yield from table_documents(where, rows, suffix, field=self.reading.field, quotes=self.reading.quotes)
        else:
            yield from text_documents(lines(pieces, where=where, most=LONGEST_LINE, longest=PIECE))


def _opened_zip(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (struct.error, ValueError, OverflowError) as error:  # of a broken list of members
        raise zipfile.BadZipFile(str(error)) from error
