"""Text from standard input, of bounded size."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from chronomoe.errors import ConfigError

STANDARD_INPUT = "-"
MOST_CHARACTERS = 64 * 1024 * 1024
"""Of a text that is held in memory."""
MOST_BYTES = 1024 * 1024 * 1024
"""Of a text that is kept in a file meanwhile."""
_CHUNK = 1024 * 1024


def read_text(text: str) -> str:
    """The text, or all of standard input if it is ``-``; :class:`ConfigError` for more than is read."""
    if text != STANDARD_INPUT:
        return text
    stream = _stream()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    found = str(stream.read(MOST_CHARACTERS + 1))
    if len(found) > MOST_CHARACTERS:
        raise ConfigError(f"standard input holds more than {MOST_CHARACTERS:,} characters; give a shorter text.")
    return found


@contextmanager
def as_file(path: Path | None) -> Iterator[Path | None]:
    """The path, or while the block lasts a file with all of standard input if it is ``-``."""
    if path is None or str(path) != STANDARD_INPUT:
        yield path
        return
    source, size = getattr(_stream(), "buffer", None), 0
    if source is None:  # replaced by something that holds text
        source = io.BytesIO(_stream().read(MOST_BYTES + 1).encode())
    with TemporaryDirectory() as place:
        file = Path(place) / "standard_input.txt"
        with file.open("wb") as out:
            while chunk := source.read(_CHUNK):
                size += out.write(chunk)
                if size > MOST_BYTES:
                    raise ConfigError(f"standard input holds more than {MOST_BYTES:,} bytes; give a file instead.")
        yield file


def _stream() -> io.TextIOBase:
    if sys.stdin is None:
        raise ConfigError("there is no standard input to read; name a file, or give the text itself.")
    return sys.stdin  # type: ignore[return-value]
