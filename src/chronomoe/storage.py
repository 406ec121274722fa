"""Writes that happen completely or not at all: files and directories are made beside their place, then renamed."""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from chronomoe.errors import CheckpointError


@contextmanager
def held(lock: Path, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes out; :class:`CheckpointError` with ``busy`` after ``patience`` seconds of waiting."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        mine = FileLock(lock, timeout=patience, poll_interval=0.01).acquire()
    except Timeout:
        raise CheckpointError(busy) from None
    with mine:
        yield


@contextmanager
def whole_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends, and vanishes if the block fails.

    Raises :class:`CheckpointError` if ``path`` exists and may not be replaced, or if the disk is full.
    """
    if not replace:
        _refuse_taken(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    work.chmod(0o755)
    try:
        with disk_full_explained(path):
            yield work
            for file in work.rglob("*"):
                _sync(file)
            if not replace:
                _refuse_taken(path)  # by somebody else, meanwhile
            _put_in_place(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_taken(path: Path) -> None:
    if path.exists():
        raise CheckpointError(f"{path} exists already; choose another name or remove it.")


def _put_in_place(work: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        os.rename(path, old / path.name)
        os.rename(work, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(work, path)
    _sync(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; it replaces ``path`` in one step when the block ends, and vanishes if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with disk_full_explained(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text`` in one step."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a file by ``value`` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
    """Turn a full disk into a :class:`CheckpointError` that says nothing saved earlier is lost."""
    try:
        yield
    except Exception as error:
        # safetensors wraps the system's error and keeps only its words.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise CheckpointError(
                f"the disk is full: {path} could not be written. What was saved before is untouched; free some space."
            ) from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
