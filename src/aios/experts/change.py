"""Change an expert in the registry and in the brains it is attached to. Imports no torch."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from aios.brains.brain import Brain
from aios.store.experts import ExpertEntry, Registry
from chronomoe.experts.listing import gates_name, read_list, write_list


def change(root: Path, expert_id: str, action: Callable[[], ExpertEntry]) -> ExpertEntry:
    """Do something to an expert in the registry, and write what it is now into the brains it is attached to.

    Raises what ``action`` raises, and :class:`CheckpointError`, with nothing changed, when a brain is in use or its
    list is damaged.
    """
    named = [Brain.at(root, name) for name in Registry(root).get(expert_id).attached_to]
    brains = [brain for brain in named if brain.path.is_dir()]  # others were deleted since
    with ExitStack() as locks:
        for brain in sorted(brains, key=lambda brain: brain.path):  # two processes take them in the same order
            locks.enter_context(brain.lock())
        folders = [brain.weights for brain in brains]
        lists = [(folder, read_list(folder), gates_name(folder)) for folder in folders]
        entry = action()
        state = {"expert_id": entry.expert_id, "active": entry.is_active, "frozen": entry.is_frozen}
        for folder, listed, gates in lists:
            changed = [one | state if one["expert_uid"] == entry.expert_uid else one for one in listed]
            write_list(folder, changed, gates)
    return entry
