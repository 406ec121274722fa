"""Attached experts beside a saved model.

    experts.json              who is attached, in order: {"attached": [{"expert_id", "expert_uid", ...}]}
    experts/<uid>.safetensors the expert itself, as in its own file

The model's own files are those of the base: detaching all experts leaves what was there before, byte for byte.
"""

import json
from pathlib import Path
from typing import Any

from chronomoe.errors import CheckpointError
from chronomoe.experts.attachment import attach_expert
from chronomoe.experts.file import base_fingerprint, read_expert, save_expert
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
    """Replace the list; an empty one leaves no file, and files of experts that are not in it go."""
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


def save_attached(model: Any, folder: Any) -> None:
    """Write the experts attached to ``model`` into the folder it was saved in."""
    subbrains = getattr(model, "subbrains", None)
    if subbrains is None:
        if (Path(folder) / LIST).exists():  # of a model that was saved here before
            write_list(Path(folder), [])
        return
    entries, fingerprint = [], base_fingerprint(model)
    for expert in subbrains.attached:
        save_expert(expert, expert.header, Path(folder) / FOLDER / f"{expert.uid}.safetensors")
        known = {"expert_id": expert.expert_id, "expert_uid": expert.uid, "active": expert.active}
        entries.append(expert.attachment | known | {"base_fingerprint": fingerprint, "base_dtype": str(model.dtype)})
    write_list(Path(folder), entries)


def load_attached(model: Any, folder: Any) -> None:
    """Attach to ``model`` the experts saved beside it, in their order.

    Raises :class:`CheckpointError` when the list or an expert is damaged, or the model's weights are others than those
    the experts were attached to.
    """
    entries = read_list(Path(folder))
    fingerprint = base_fingerprint(model) if entries else ""
    for entry in entries:
        expert, header = read_expert(Path(folder) / FOLDER / f"{entry['expert_uid']}.safetensors")
        # Weights that were cast in loading cannot be compared.
        same_dtype = entry.get("base_dtype", str(model.dtype)) == str(model.dtype)
        if same_dtype and entry.get("base_fingerprint") != fingerprint:
            raise CheckpointError(
                f"the weights in {folder} are not those expert {entry['expert_id']} was attached to; detach it."
            )
        expert.expert_id, expert.header, expert.attachment = entry["expert_id"], header, entry
        expert.active = bool(entry.get("active", True))
        expert.freeze(bool(entry.get("frozen", False)))
        attach_expert(model, expert)
