"""Slots that exist: a goal is linked to a slot only if the brain has that layer and expert."""

import json
from pathlib import Path
from typing import Any

from aios.store.goals import Goal, Goals
from aios.store.slots import Slot, read_slot
from chronomoe.errors import CheckpointError


def link(root: Path, goal_id: int, expert: str) -> Goal:
    """Link a goal to an expert, or to a slot that exists; raises what :meth:`Goals.link` and :func:`find_slot` do."""
    return Goals(root).link(goal_id, link_target(root, expert))


def link_target(root: Path, expert: str) -> str:
    """What a goal is linked to: an expert's id or uid as it is, a slot as ``family/brain:LAYER.EXPERT``.

    Raises what :func:`find_slot` raises for a slot that does not exist.
    """
    return str(find_slot(root, expert)) if ":" in expert else expert


def find_slot(root: Path, word: str) -> Slot:
    """The slot, its brain by family and name.

    Raises :class:`ConfigError` for what is no slot, :class:`CheckpointError` when there is no such brain in the
    workspace or it has no such layer or expert.
    """
    from aios.brains.bundle import find_brain

    slot = read_slot(word)
    bundle = find_brain(root, slot.brain)
    if bundle.resolve().parent.parent != (root / "artifacts/brains").resolve() or not bundle.is_dir():
        raise CheckpointError(f"there is no brain {slot.brain} in this workspace; `aios brains list` shows them.")
    layers, experts = _size(bundle)
    if not experts:
        raise CheckpointError(f"brain {slot.brain} has no experts of its own; link the goal to another.")
    if slot.layer is not None and slot.layer >= layers:
        raise CheckpointError(f"brain {slot.brain} has no layer {slot.layer}; its layers are 0 to {layers - 1}.")
    if slot.expert >= experts:
        raise CheckpointError(f"brain {slot.brain} has no expert {slot.expert}; its experts are 0 to {experts - 1}.")
    return Slot(f"{bundle.parent.name}/{bundle.name}", slot.layer, slot.expert)


def _size(bundle: Path) -> tuple[int, int]:
    """Layers with a router, and experts in each, as the brain's config.json has it."""
    from aios.brains.bundle import checkpoint_folder

    # In training a brain has only those of its checkpoints, all alike.
    files = [bundle / "config.json", *checkpoint_folder(bundle).glob("step_*/config.json")]
    file = next((file for file in files if file.is_file()), files[0])
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if config["model_type"] == "hrm_actv1":
            layers, used = config["l_layers"] + config["h_layers"], config["use_moe"]
        else:
            layers, used = config["num_hidden_layers"], True
        return int(layers), int(config["num_local_experts"]) if used else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} does not say how many layers and experts there are ({type(error).__name__}); train the brain or "
            "put a copy back."
        ) from error
