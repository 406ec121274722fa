"""Change an expert in the registry and in the brains it is attached to. Imports nothing heavy."""

from collections.abc import Callable
from pathlib import Path

from aios.brains.brain import Brain
from aios.store.experts import ExpertEntry, Registry


def change(root: Path, expert_id: str, action: Callable[[], ExpertEntry]) -> ExpertEntry:
    """Do something to an expert in the registry, and update the brains it is attached to.

    Raises what ``action`` raises, and :class:`CheckpointError`, with nothing changed, when a brain is in use.
    """
    named = [Brain.at(root, name) for name in Registry(root).get(expert_id).attached_to]
    brains = [brain for brain in named if brain.path.is_dir()]  # others were deleted since
    if not brains:
        return action()
    from aios.experts.attach import change_attached  # torch: only where a brain is to be written

    return change_attached(brains, action)
