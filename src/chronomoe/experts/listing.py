"""experts.json, the list of the experts attached to a saved model: its one reader and its one writer. No torch."""

import json
import re
from pathlib import Path
from typing import Any

from chronomoe.errors import CheckpointError
from chronomoe.storage import write_json

LIST = "experts.json"
FOLDER = "experts"
_GATES = re.compile(r"gates-[0-9a-f]{16}\.safetensors")


def read_list(folder: Path) -> list[dict[str, Any]]:
    """The experts attached to a saved model, in order; :class:`CheckpointError` when the list is damaged."""
    return _read(folder)[0]


def gates_name(folder: Path) -> str | None:
    """The file in experts/ with the gates as they are fitted to one another; None while each has its own."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    file = folder / LIST
    if not file.exists():
        return [], None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found, gates = content["attached"], content.get("gates")
        if not all(isinstance(one["expert_id"], str) and str(one["expert_uid"]).isalnum() for one in found):
            raise ValueError("an entry has no expert_uid")
        if gates is not None and not (isinstance(gates, str) and _GATES.fullmatch(gates)):
            raise ValueError(f"gates is {gates!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); put a copy back, or remove it to detach all.") from error
    return list(found), gates


def write_list(folder: Path, attached: list[dict[str, Any]], gates: str | None) -> None:
    """Replace the list, by no file if it is empty, and remove files of experts, and of gates, that are not in it."""
    kept = {f"{one['expert_uid']}.safetensors" for one in attached} | ({gates} if gates else set())
    if attached:
        write_json(folder / LIST, {"attached": attached} | ({"gates": gates} if gates else {}))
    else:
        (folder / LIST).unlink(missing_ok=True)
    for file in (folder / FOLDER).glob("*.safetensors"):
        if file.name not in kept:
            file.unlink()
    if not attached and (folder / FOLDER).is_dir() and not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()
