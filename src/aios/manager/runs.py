"""Runs of a workspace as their metrics.jsonl tells them, followed while they grow. No web in here.

A file is read from where the last reading ended, and a bounded, evenly thinned selection of it is kept: an hour of
watching costs no more memory than a minute.
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios.brains.brain import METRICS
from aios.brains.metrics import History, Record, read_record
from chronomoe.errors import ConfigError

POINTS, COLUMNS = 600, 120
"""Records kept of a run for lines, and for heat maps."""
LIVE = 120.0
"""Seconds after its last record for which a run without a job counts as running."""
_BLOCK = 1 << 22
_TAIL = 1 << 17
_BEGINNING = 256
_KEPT = 6


@dataclass(frozen=True)
class RunSummary:
    """One run in the list."""

    path: str
    """Its metrics file, from the root of the workspace."""
    name: str
    step: int
    loss: float | None
    changed: float
    size: int


class RunLog:
    """The metrics of one run, followed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.start_over()

    def start_over(self) -> None:
        """Forget all that was read."""
        self.offset, self.identity, self.beginning = 0, -1, b""
        self.train = History("train", POINTS, _numbers)
        self.heat = History("train", COLUMNS, _heat)
        self.evaluations = History("eval", POINTS, _numbers)
        self.last: Record = {}
        self.masked: list[list[int]] = []
        """(layer, expert) of those that health keeps closed."""
        self.final: Record | None = None
        """How it ended, unless it goes on."""
        self.changed = 0.0

    def poll(self) -> bool:
        """Read what was added; says whether that was anything. A file that was replaced is read from its beginning."""
        try:
            with self.file.open("rb") as lines:
                state = os.fstat(lines.fileno())
                beginning = lines.read(_BEGINNING)
                # A new file may have the number of the one it replaces.
                same = state.st_ino == self.identity and beginning.startswith(self.beginning)
                if not same or state.st_size < self.offset:
                    self.start_over()
                    self.identity = state.st_ino
                self.beginning = beginning
                self.changed, before = state.st_mtime, self.offset
                lines.seek(self.offset)
                while block := lines.read(_BLOCK):
                    end = block.rfind(b"\n") + 1
                    if not end and len(block) < _BLOCK:
                        break  # a line that is being written
                    self._take(block[:end])
                    self.offset += end or len(block)  # longer than any of ours: passed over
                    lines.seek(self.offset)
                return self.offset != before
        except OSError:
            return False

    def _take(self, block: bytes) -> None:
        for line in block.decode("utf-8", errors="replace").splitlines():
            record = read_record(line)
            if record is None:
                continue
            for history in (self.train, self.heat, self.evaluations):
                history.take(record)
            if record.get("event") == "train":
                self.last = _numbers(record)
                masked = record.get("masked_experts")
                self.masked = [pair for pair in masked if len(pair) == 2] if masked and _is_map(masked) else []
            if record.get("event") in ("train", "resumed", "final"):
                self.final = record if record["event"] == "final" else None

    @property
    def live(self) -> bool:
        """Was it written to just now, and not for the last time?"""
        return self.final is None and time.time() - self.changed < LIVE

    def line(self, name: str) -> list[list[float]]:
        """Steps and values of one number of the training records."""
        return [[one["step"], one[name]] for one in self.train.records if one.get(name) is not None]

    def domains(self) -> list[str]:
        """What is evaluated apart."""
        found = {name for one in self.evaluations.records for name in one}
        return sorted(found - {"step", "mean", "segments"})

    def bits(self, domain: str) -> list[list[float]]:
        """Steps and bits per byte of one domain."""
        return [[one["step"], one[domain]] for one in self.evaluations.records if one.get(domain) is not None]

    def columns(self, name: str, layer: int) -> tuple[list[int], list[list[float]]]:
        """Steps, and the row over experts of one layer at each; of the latest form of a brain that grew."""
        found = [(one["step"], one[name][layer]) for one in self.heat.records if len(one.get(name) or ()) > layer]
        width = len(found[-1][1]) if found else 0
        found = [(step, row) for step, row in found if len(row) == width]
        return [step for step, _ in found], [row for _, row in found]

    def layers(self, name: str) -> int:
        """How many layers a heat map of this has."""
        return len(self.heat.records[-1].get(name) or ()) if self.heat.records else 0


class Runs:
    """The runs below artifacts/."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._home = (self.root / "artifacts").resolve()
        self._summaries: dict[str, tuple[tuple[int, int], RunSummary]] = {}
        self._logs: dict[str, RunLog] = {}
        self._lock = threading.Lock()

    def all(self) -> list[RunSummary]:
        """Every run, the one that was written to last first."""
        found = []
        for file in self._files():
            try:
                state = file.stat()
            except OSError:  # it has gone
                continue
            path, mark = file.relative_to(self.root).as_posix(), (state.st_size, state.st_mtime_ns)
            known = self._summaries.get(path)
            if known is None or known[0] != mark:
                known = (mark, _summary(path, file, state))
                self._summaries[path] = known
            if known[1].step or file.name == METRICS:  # a run that has just begun
                found.append(known[1])
        return sorted(found, key=lambda one: -one.changed)

    def follow(self, path: str) -> RunLog:
        """The metrics of a run, read up to now; :class:`ConfigError` for what is no run of this workspace."""
        known = path in self._logs and self._is_ours(self.root / path)
        if not known and path not in {file.relative_to(self.root).as_posix() for file in self._files()}:
            raise ConfigError(f"there is no run {path!r} in this workspace.")
        with self._lock:
            log = self._logs.pop(path, None) or RunLog(self.root / path)
            self._logs[path] = log  # the last one is the one that was used last
            while len(self._logs) > _KEPT:
                del self._logs[next(iter(self._logs))]
            log.poll()
            return log

    def _files(self) -> Iterator[Path]:
        for pattern in ("brains/*/*/*.jsonl", "brains/*/*.jsonl", "experts/*/*.jsonl", "*.jsonl"):
            for file in sorted((self.root / "artifacts").glob(pattern)):
                hidden = any(folder.startswith(".") for folder in file.relative_to(self.root).parts)
                if not hidden and self._is_ours(file):
                    yield file

    def _is_ours(self, file: Path) -> bool:
        return file.is_file() and file.resolve().is_relative_to(self._home)


def _is_number(value: Any) -> bool:
    """Is it one that a browser can draw?"""
    return type(value) in (int, float) and abs(value) < 1e15


def _summary(path: str, file: Path, state: os.stat_result) -> RunSummary:
    with file.open("rb") as lines:
        lines.seek(max(0, state.st_size - _TAIL))
        records = [read_record(line) for line in lines.read(_TAIL).decode("utf-8", errors="replace").splitlines()]
    losses = [one for one in records if one is not None and one.get("event") == "train"]
    steps = [one["step"] for one in records if one is not None and "event" in one]
    loss = losses[-1].get("lm_loss", losses[-1].get("loss")) if losses else None
    parts = Path(path).with_suffix("").parts[1:]
    name = "/".join(parts[:-1] if parts[-1] == "metrics" else parts)
    return RunSummary(path, name, steps[-1] if steps else 0, loss, state.st_mtime, state.st_size)


def _numbers(record: Record) -> Record:
    counts = {name: len(record[name]) for name in ("valleys", "ridges") if isinstance(record.get(name), list)}
    return counts | {name: value for name, value in record.items() if _is_number(value)}


def _heat(record: Record) -> Record:
    kept: dict[str, Any] = {"step": record["step"]}
    return kept | {name: record[name] for name in ("load", "T_bar") if _is_map(record.get(name))}


def _is_map(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and all(one is None or _is_number(one) for one in row) for row in rows
    )
