"""Compressed files as streams of bounded size: .gz, .bz2, .xz, .zst; what is damaged is named."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from aios.data.sources import PackageNeededError, unreadable
from chronomoe.errors import DataError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
RATIO = 200
"""Text does not shrink to less than one part in this many; what unpacks to more was made to fill the memory."""
FREE = 64 * 1024 * 1024
"""Bytes that any file may unpack to."""
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


class Stream(Protocol):
    """What can be read piece by piece."""

    def read(self, size: int = ..., /) -> bytes:
        """At most ``size`` bytes; none at the end."""


class Allowance:
    """How much one file on disk may unpack to, all of its members and layers together."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._most = path, max(FREE, RATIO * size)
        self._left = self._most

    @contextmanager
    def lent(self) -> Iterator[None]:
        """What is spent within the block is given back, if it ends well."""
        left = self._left
        yield
        self._left = left

    def spend(self, size: int) -> None:
        """Take so many bytes; :class:`DataError` when there are not as many left."""
        self._left -= size
        if self._left < 0:
            raise DataError(
                f"{self._path} unpacks to more than {self._most:,} bytes, {RATIO} times its size or more, as no text "
                "does; unpack it first if that is meant."
            )


class _Bounded:
    def __init__(self, stream: Stream, allowance: Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._allowance.spend(len(data))
        return data


def bounded(stream: Stream, allowance: Allowance) -> Stream:
    """The same stream; reading more than is allowed raises :class:`DataError`."""
    return _Bounded(stream, allowance)


def unpacked(where: str, stream: Stream, allowance: Allowance) -> Stream:
    """What a compressed stream holds; its name ends in one of :data:`SUFFIXES`."""
    suffix, packed = os.path.splitext(where)[1].lower(), _as_file(stream)
    if suffix == ".zst":
        return _Bounded(_zstd().ZstdFile(packed), allowance)
    if suffix == ".gz":
        return _Bounded(gzip.GzipFile(fileobj=packed), allowance)
    return _Bounded(bz2.BZ2File(packed) if suffix == ".bz2" else lzma.LZMAFile(packed), allowance)


def _as_file(stream: Stream) -> IO[bytes]:
    """The libraries read no more of a file than this."""
    return stream  # type: ignore[return-value]


def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14 has it
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise PackageNeededError(".zst", "zstd") from None
    return zstd


@contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Turn what a damaged or unreadable file raises into a :class:`DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(where, error) from error
        # bz2 and gzip raise an OSError without a number; the class of zstd's error comes with an optional package.
        if isinstance(error, (OSError, *_DAMAGED)) or type(error).__name__ == "ZstdError":
            why = str(error).rstrip(".") or "it is cut short"
            raise DataError(f"{where} is a damaged or unsupported archive: {why}; replace it.") from error
        raise
