"""Sources of text: their spelling, the files below a folder, and what reading them came across."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from chronomoe.data.store_info import METADATA
from chronomoe.errors import ConfigError, DataError

NAMED = 20
"""Files left out that are named; more are only counted."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the text of a domain comes from."""

    name: str
    """The domain it belongs to; sources of the same name are one domain."""
    path: str
    """File, folder, archive, .parquet, or hf:<data set>[:config][:split]."""
    weight: float | None = None
    """Share of training sequences, relative to the other sources; None: in proportion to its tokens."""
    held_out: bool = False
    """Evaluate on all of it, train on none."""


class FlagNeededError(DataError):
    """Text that a flag of `aios data prepare` makes usable."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}; {advice}.")
        self.problem = problem
        """What is wrong, naming the file."""
        self.advice = advice
        """What to do, naming the flag."""


class PackageNeededError(DataError):
    """A kind of file that only an optional package reads."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"Reading {what} needs an optional package: pip install 'chronomoe-aios[{extra}]'.")


@dataclass(kw_only=True)
class Tally:
    """What reading came across, counted as it goes."""

    files: int = 0
    """Text files read."""
    replaced_bytes: int = 0
    """Bytes that were not UTF-8, read as replacement characters."""
    left_out: list[str] = field(default_factory=list)
    """A sentence, without its full stop, on each of the first files that were left out."""
    left_out_count: int = 0
    """How many were left out."""
    damaged: set[str] = field(default_factory=set)
    """Those of them that are damaged."""

    def leave_out(self, sentence: str) -> None:
        """Count and name a file that is left out."""
        self.left_out_count += 1
        if len(self.left_out) < NAMED:
            self.left_out.append(sentence)


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


def prepare_command(sources: Sequence[tuple[str, str]], tokenizer: Path, out: Path | str) -> str:
    """The `aios data prepare` of these names and paths with the tokenizer in a folder, ready to paste."""
    named = [f"{name}={path}" for name, path in sources]
    overwrite = ["--overwrite"] if (Path(out) / METADATA).is_file() else []
    return shlex.join(["aios", "data", "prepare", *named, "--tokenizer", str(tokenizer), "--out", str(out), *overwrite])


def why_no_file(path: str) -> str | None:
    """Why a path cannot be read as a file, found without opening it; None when it can."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "is a link that leads nowhere" if os.path.islink(path) else "does not exist"
    except OSError as error:
        return "is a link that leads to itself" if os.path.islink(path) else f"cannot be read: {error.strerror}"
    if stat.S_ISREG(mode):
        return None
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, which may never end; save its text in a file"


def unreadable(where: str, error: OSError) -> DataError:
    """The error of a file or folder that the system does not let be read."""
    return DataError(f"{where} cannot be read: {error.strerror}.")


def files_below(folder: str, tally: Tally) -> Iterator[str]:
    """The files below a folder in order, each once, whatever characters their names hold.

    Names that begin with a dot and prepared data are passed over. Links to folders are left out, and so lead round in
    no circle; so are pipes, devices and links to nowhere.
    """

    def unlisted(error: OSError) -> None:
        if error.filename == folder:
            raise unreadable(folder, error) from error
        tally.leave_out(f"{error.filename} cannot be read: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=unlisted):
        if METADATA in files and "tokenizer" in folders:  # prepared data, not text
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if os.path.islink(path := os.path.join(parent, name)):
                tally.leave_out(f"{path} is a link to a folder; name that as a source of its own")
        for path in (os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")):
            if (why := why_no_file(path)) is None:
                yield path
            else:
                tally.leave_out(f"{path} {why}")
