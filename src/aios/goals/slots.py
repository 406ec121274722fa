"""Slots that exist: a goal is linked to a slot only if the brain has that layer and expert."""

from pathlib import Path

from aios.brains.brain import Brain
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
    slot = read_slot(word)
    brain = Brain.at(root, slot.brain)
    if brain.path.resolve().parent.parent != (root / "artifacts/brains").resolve() or not brain.path.is_dir():
        raise CheckpointError(f"there is no brain {slot.brain} in this workspace; `aios brains list` shows them.")
    layers, experts = brain.layers_and_experts
    if not experts:
        raise CheckpointError(f"brain {slot.brain} has no experts of its own; link the goal to another.")
    if slot.layer is not None and slot.layer >= layers:
        raise CheckpointError(f"brain {slot.brain} has no layer {slot.layer}; its layers are 0 to {layers - 1}.")
    if slot.expert >= experts:
        raise CheckpointError(f"brain {slot.brain} has no expert {slot.expert}; its experts are 0 to {experts - 1}.")
    return Slot(brain.name, slot.layer, slot.expert)
