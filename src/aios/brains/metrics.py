"""metrics.jsonl of a run, read back: one history, however often the run was stopped and continued."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chronomoe.errors import CheckpointError

Record = dict[str, Any]


def read_metrics(file: Path, event: str = "train") -> list[Record]:
    """The records of one kind, by step; what a continued run did again replaces what it had done.

    A last line cut by a kill is passed over. Raises :class:`CheckpointError` when there is no such file.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise CheckpointError(f"there is no {file}; name a brain that has been trained, or its metrics file.") from None
    history = History(event)
    for line in lines:
        history.take(read_record(line))
    return history.records


def read_record(line: str) -> Record | None:
    """One line of the file; None for one that is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 1 << 53 else None


class History:
    """The records of one kind, by step, taken one line after the other.

    With ``limit`` at most so many are kept, evenly: whenever there are more, every other one goes. ``keep`` picks what
    is kept of a record.
    """

    def __init__(self, event: str, limit: int | None = None, keep: Callable[[Record], Record] | None = None) -> None:
        self.event, self.limit, self.keep = event, limit, keep
        self.records: list[Record] = []
        self.stride = 1
        self._seen = 0

    def take(self, record: Record | None) -> None:
        """One record of any kind, in the order of the file."""
        if record is None or record.get("event") not in ("resumed", self.event):
            return
        while self.records and self.records[-1]["step"] >= record["step"] + (record["event"] == "resumed"):
            self.records.pop()
        if record["event"] != self.event:
            return
        self._seen += 1
        if (self._seen - 1) % self.stride:
            return
        self.records.append(record if self.keep is None else self.keep(record))
        if self.limit is not None and len(self.records) > self.limit:
            self.records = self.records[::2]
            self.stride *= 2
