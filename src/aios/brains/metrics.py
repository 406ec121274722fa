"""metrics.jsonl of a run, read back: one history, however often the run was stopped and continued."""

import json
from pathlib import Path
from typing import Any

from chronomoe.errors import CheckpointError


def read_metrics(file: Path, event: str = "train") -> list[dict[str, Any]]:
    """The records of one kind, by step; what a continued run did again replaces what it had done.

    A last line cut by a kill is passed over. Raises :class:`CheckpointError` when there is no such file.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise CheckpointError(f"there is no {file}; name a brain that has been trained, or its metrics file.") from None
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if record.get("event") in ("resumed", event):
            while records and records[-1]["step"] >= record["step"] + (record["event"] == "resumed"):
                records.pop()
        if record.get("event") == event:
            records.append(record)
    return records
