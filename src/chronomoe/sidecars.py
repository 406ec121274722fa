"""What lies beside a saved model, and is no part of its weights: SIDECARS, saved, loaded and copied together.

    chronovisor.safetensors, .json   the control layer: fields of the routers and what moves them
    experts.json                     attached experts, in order: {"attached": [{"expert_id", "expert_uid", ...}]}
    experts/<uid>.safetensors        each expert, as in its own file
    experts/gates-*.safetensors      their gates as they are fitted to one another, where there are several
    goal_conditioning.safetensors    what routers have learned of goals

config.json and model.safetensors are those of the base: without the sidecars they are a plain model, byte for byte.
Which goals are on is in no file: whatever runs a model turns them on.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from chronomoe.control.checkpoint import REST, TENSORS, ChronovisorCheckpoint
from chronomoe.errors import CheckpointError
from chronomoe.experts.attachment import attach_expert
from chronomoe.experts.file import base_fingerprint, read_expert, save_expert
from chronomoe.experts.listing import FOLDER, LIST, gates_name, read_list, write_list
from chronomoe.experts.together import load_gates, save_gates
from chronomoe.goals.conditioning import FILE as CONDITIONING
from chronomoe.goals.conditioning import save_conditioning
from chronomoe.storage import disk_full_explained

SIDECARS = TENSORS, REST, "experts.json", "experts/*.safetensors", CONDITIONING
"""Files beside a model, as patterns within its folder."""
_HUB = "cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"
"""Arguments of from_pretrained that say where on the hub, or in its cache, a model is."""
_OLD = "steering.", "controller."
"""Version 0.1.0 kept the control layer among the weights, under these names."""


def save(model: Any, folder: Path | str, *, control: bool = True) -> None:
    """Write all sidecars of ``model`` into the folder it was saved in; those it does not have are removed there.

    ``control=False`` leaves out the control layer.
    """
    folder = Path(folder)
    controller = getattr(model, "controller", None) if control else None
    if controller is not None:
        ChronovisorCheckpoint.from_controller(controller).save(folder)
    else:
        for name in (TENSORS, REST):
            (folder / name).unlink(missing_ok=True)
    save_experts(model, folder)
    if getattr(getattr(model, "steering", None), "conditioning", None) is not None:
        save_conditioning(model, folder)
    else:
        (folder / CONDITIONING).unlink(missing_ok=True)


def load(model: Any, folder: Path | str) -> None:
    """Give ``model`` what was saved beside its weights: the control layer, deployed, and attached experts.

    What routers learned of goals is read when a goal is turned on: it costs a pass over all weights. Raises
    :class:`CheckpointError` for a sidecar that is damaged or belongs to another model.
    """
    folder = Path(folder)
    controller = getattr(model, "controller", None)
    if controller is not None and any((folder / name).is_file() for name in (TENSORS, REST)):
        ChronovisorCheckpoint.load(folder).restore_to_controller(controller, folder)
        controller.deploy()
    load_experts(model, folder)


def copy(source: Path, target: Path) -> None:
    """Copy the sidecars in ``source`` into ``target``, each in one step."""
    for pattern in SIDECARS:
        for file in sorted(source.glob(pattern)):
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            temporary = place.with_name(f".{place.name}.new")
            with disk_full_explained(place):
                shutil.copyfile(file, temporary)
            os.replace(temporary, place)


def folder_of(model_name: Any, **settings: Any) -> Path | None:
    """The folder of a saved model, with its sidecars in it: a folder on disk, or a snapshot in the cache of the hub.

    ``settings`` are those of from_pretrained. None where a model was built from tensors.
    """
    if model_name is None:
        return None
    if Path(model_name).is_dir():
        return Path(model_name) / (settings.get("subfolder") or "")
    hub = {name: settings[name] for name in _HUB if settings.get(name) is not None}
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    config = cached_file(model_name, "config.json", **hub, **missing)
    if config is None:
        return None
    folder = Path(config).parent
    for name in (TENSORS, REST, LIST):
        cached_file(model_name, name, **hub, **missing)
    for entry in read_list(folder):
        cached_file(model_name, f"{FOLDER}/{entry['expert_uid']}.safetensors", **hub, **missing)
    if (gates := gates_name(folder)) is not None:
        cached_file(model_name, f"{FOLDER}/{gates}", **hub, **missing)
    return folder


def weight_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's model*.safetensors; a damaged file is for the loader to refuse."""
    names: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as content:
            names.update(content.keys())
    return names


def refuse_old(names: Iterable[str], where: Any) -> None:
    """:class:`CheckpointError` for weights, by their names, among which version 0.1.0 kept the control layer."""
    if any(name.startswith(_OLD) for name in names):
        raise CheckpointError(
            f"the weights in {where} were saved by version 0.1.0, with the control layer among them; train the model "
            "again, or use it with that version."
        )


# -- attached experts --------------------------------------------------------------------------------------------------


def save_experts(model: Any, folder: Path) -> None:
    """Write the experts attached to ``model`` into the folder it was saved in."""
    subbrains = getattr(model, "subbrains", None)
    if subbrains is None:
        if (folder / LIST).exists():  # of a model that was saved here before
            write_list(folder, [], None)
        return
    entries, fingerprint = [], base_fingerprint(model)
    for expert in subbrains.attached:
        save_expert(expert, expert.header, folder / FOLDER / f"{expert.uid}.safetensors")
        known = {"expert_id": expert.expert_id, "expert_uid": expert.uid, "active": expert.active}
        entries.append(expert.attachment | known | {"base_fingerprint": fingerprint, "base_dtype": str(model.dtype)})
    write_list(folder, entries, save_gates(subbrains.attached, folder / FOLDER))


def load_experts(model: Any, folder: Path) -> None:
    """Attach to ``model`` the experts saved beside it, in their order.

    Raises :class:`CheckpointError` when the list or an expert is damaged, or the model's weights are others than those
    the experts were attached to.
    """
    entries = read_list(folder)
    fingerprint = base_fingerprint(model) if entries else ""
    for entry in entries:
        expert, header = read_expert(folder / FOLDER / f"{entry['expert_uid']}.safetensors")
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
    if (gates := gates_name(folder)) is not None:
        load_gates(model.subbrains.attached, folder / FOLDER / gates)
