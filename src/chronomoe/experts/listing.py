"""experts.json, the list of the experts attached to a saved model: its one reader and its one writer. No torch."""

import json
from pathlib import Path
from typing import Any

from chronomoe.errors import CheckpointError
from chronomoe.storage import write_json

LIST = "experts.json"
FOLDER = "experts"


def read_list(folder: Path) -> list[dict[str, Any]]:
    """The experts attached to a saved model, in order; :class:`CheckpointError` when the list is damaged."""
    file = folder / LIST
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["attached"]
        if not all(isinstance(one["expert_id"], str) and str(one["expert_uid"]).isalnum() for one in found):
            raise ValueError("an entry has no expert_uid")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); put a copy back, or remove it to detach all.") from error
    return list(found)


def write_list(folder: Path, attached: list[dict[str, Any]]) -> None:
    """Replace the list, by no file if it is empty, and remove files of experts that are not in it."""
    kept = {f"{one['expert_uid']}.safetensors" for one in attached}
    if attached:
        write_json(folder / LIST, {"attached": attached})
    else:
        (folder / LIST).unlink(missing_ok=True)
    for file in (folder / FOLDER).glob("*.safetensors"):
        if file.name not in kept:
            file.unlink()
    if not attached and (folder / FOLDER).is_dir() and not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()
