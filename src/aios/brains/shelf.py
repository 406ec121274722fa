"""The brains of a workspace: list, show, rename, delete, export. Imports nothing heavy."""

import json
import shutil
from pathlib import Path
from typing import Any

from aios.brains.bundle import checkpoint_folder, exclusive, find_brain, load_brain, read_run, trained_further
from aios.brains.settings import SHAPES
from aios.workspace import Workspace
from chronomoe.errors import CheckpointError, ConfigError


def list_brains(root: Path) -> list[dict[str, Any]]:
    """One entry a brain, by family and name; one that cannot be read says why under ``problem``."""
    found = []
    for family in SHAPES:
        for file in sorted((root / "artifacts/brains" / family).glob("[!.]*/run.json")):  # not what is half written
            try:
                found.append(describe(file.parent) | {"name": file.parent.name, "family": family})
            except CheckpointError as error:
                found.append({"name": file.parent.name, "family": family, "problem": str(error)})
    return found


def describe(bundle: Path) -> dict[str, Any]:
    """What is known of a brain: its family, training, evaluation and size; :class:`CheckpointError` if it is none."""
    from chronomoe.training.checkpoint import list_checkpoints, read_trainer_state

    run = read_run(bundle)
    checkpoints = list_checkpoints(checkpoint_folder(bundle))
    # Not from the metrics: several brains may write into one log.
    steps = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
    finished = any(bundle.glob("model*.safetensors")) and not trained_further(bundle)
    bits = run.get("bits_per_byte") if finished else None
    if checkpoints and bits is None:
        bits = read_trainer_state(checkpoints[-1])["state"].get("best_loss")
    return {
        "family": run.get("family", "mixtral"),
        "path": str(bundle),
        "finished": finished,
        "steps": steps,
        "bits_per_byte": bits,
        "megabytes": round(sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) / 1e6, 1),
        "goal": run["settings"].get("default_goal"),
        "shape": {name: value for name, value in run["shape"].items() if value is not None},
        "training": run["training"],
    }


def rename(root: Path, brain: str, new: str) -> Path:
    """Give a brain another name; :class:`ConfigError` when that is taken or no name."""
    bundle = existing_brain(root, brain)
    target = free_place(root, new, bundle.parent.name)
    with exclusive(bundle):
        pass  # nobody is training it
    bundle.rename(target)
    _tell_experts(root, bundle, target)
    return target


def delete(root: Path, brain: str) -> Path:
    """Remove a brain and all its checkpoints."""
    bundle = existing_brain(root, brain)
    with exclusive(bundle):
        pass
    # Out of sight in one step: a removal that is cut short leaves no half a brain under its name.
    grave = bundle.with_name(f".deleted-{bundle.name}")
    if grave.exists():
        shutil.rmtree(grave)
    bundle.rename(grave)
    shutil.rmtree(grave)
    _tell_experts(root, bundle, None)
    return bundle


def _tell_experts(root: Path, bundle: Path, now: Path | None) -> None:
    """Registry and goals name brains and their slots; this one has another name now, or is gone."""
    from aios.store.experts import Registry
    from aios.store.goals import Goals

    registry, name = Registry(root), brain_name(bundle)
    for entry in registry.entries():
        if name in entry.attached_to:
            registry.note_detached(entry.expert_id, name)
            if now is not None:
                registry.note_attached(entry.expert_id, brain_name(now))
    Goals(root).brain_moved(name, None if now is None else brain_name(now))


def brain_name(bundle: Path) -> str:
    """family/name of a brain of the workspace."""
    return f"{bundle.parent.name}/{bundle.name}"


def export(root: Path, brain: str, out: Path) -> str:
    """Write a checkpoint of plain transformers into the new folder ``out``; returns its model type.

    Raises :class:`ConfigError` when ``out`` is taken or transformers has no model like this brain's.
    """
    bundle = existing_brain(root, brain)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another folder.")
    model, tokenizer = load_brain(bundle)
    if getattr(model, "subbrains", None) is not None:
        raise ConfigError(
            "transformers has no experts behind a gate: detach them from this brain before you export it."
        )
    if model.config.model_type == "hrm_actv1":
        plain = model.config.halt_max_steps == 1 and not model.config.use_moe
        equal = model.config.h_layers == model.config.l_layers and model.config.pos_encodings == "rope"
        if not (plain and equal and model.config.window_size is None):
            raise ConfigError(
                "transformers' hrm_text knows no experts, no halting, no window and no stacks of unequal depth: this "
                "brain cannot be written as one. It loads with chronomoe.hrm.HRMACTv1ForCausalLM as it is."
            )
    model.export_plain(out)
    tokenizer.save_pretrained(out)
    return str(json.loads((out / "config.json").read_text())["model_type"])


def free_place(root: Path, name: str, family: str) -> Path:
    """The folder of a brain to be; :class:`ConfigError` when the name is taken or no name."""
    place = Workspace(root).brain(name, family)
    if place.exists():
        raise ConfigError(f"there is a brain {name} already; choose another name or delete it first.")
    return place


def show(root: Path, brain: str) -> dict[str, Any]:
    """:func:`describe` a brain by its name or path; :class:`ConfigError` when there is none."""
    return describe(_known(root, brain))


def _known(root: Path, brain: str) -> Path:
    bundle = find_brain(root, brain)
    if not (bundle / "run.json").is_file():
        names = ", ".join(f"{one['family']}/{one['name']}" for one in list_brains(root)) or "none"
        raise ConfigError(f"there is no brain {brain}; brains here: {names}.")
    return bundle


def existing_brain(root: Path, brain: str) -> Path:
    """The folder of a brain of this workspace; :class:`ConfigError` when there is none."""
    bundle = _known(root, brain)
    if not bundle.resolve().is_relative_to((root / "artifacts/brains").resolve()):
        raise ConfigError(f"{bundle} is not among the brains of this workspace; handle it with your own tools.")
    return bundle
