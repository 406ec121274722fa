"""Attach experts of the workspace to brains, detach them, and keep brains in step with the registry.

A brain's own files are never written: experts.json and experts/ beside them say who is attached.
"""

from typing import Any

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.data.tokenizers import tokenizer_fingerprint
from aios.store.entry import ExpertEntry, checkpoint_file, now
from aios.store.experts import Registry
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.experts.attachment import attach_expert
from chronomoe.experts.file import base_fingerprint, read_expert, refuse_misfit
from chronomoe.experts.listing import FOLDER, read_list, write_list
from chronomoe.storage import whole_file


def attach(expert_id: str, brain: Brain, *, force: bool = False) -> ExpertEntry:
    """Attach an expert to a brain on disk, behind its gate, after those attached already; all checks come first.

    ``force`` lets an expert of another base or tokenizer pass if its shapes fit, and is recorded. Raises
    :class:`ConfigError` for an unknown expert or one attached already, :class:`CheckpointError` for an expert that is
    damaged or does not fit, or a brain in use.
    """
    registry = Registry(brain.root)
    entry = registry.get(expert_id)
    file = checkpoint_file(brain.root, entry)
    with brain.lock():
        if brain.state != "finished":
            raise CheckpointError(
                f"{brain.path.name} is still in training; finish it (--resume) before you attach an expert."
            )
        folder = brain.path
        expert, header = read_expert(file)
        if expert.uid != entry.expert_uid or header["training"] != entry.training_config:
            raise CheckpointError(
                f"{file} is not what the registry says, as if training or an import had been cut short at its end; "
                f"train {expert_id} again."
            )
        listed = read_list(folder)
        if any(one["expert_uid"] == expert.uid for one in listed):
            raise ConfigError(f"expert {expert_id} is attached to {brain.path.name} already.")
        model = load_brain(brain).model
        refuse_misfit(header, model, tokenizer_fingerprint(folder), force=force)
        fingerprint = base_fingerprint(model)
        attach_expert(model, expert)
        with whole_file(folder / FOLDER / f"{expert.uid}.safetensors") as copy:
            copy.write(file.read_bytes())
        record: dict[str, Any] = {"expert_id": expert_id, "expert_uid": expert.uid, "active": entry.is_active}
        record |= {"frozen": entry.is_frozen, "base_fingerprint": fingerprint, "base_dtype": str(model.dtype)}
        record |= {"attached_at": now(), "forced": force}
        # The registry first: an expert it takes for attached can be attached again, or detached; one it does not know
        # of would be left out when the expert is changed.
        entry = registry.note_attached(expert_id, brain.name)
        write_list(folder, [*listed, record])
        return entry


def detach(expert_id: str, brain: Brain) -> str:
    """Take an expert off a brain on disk; returns its uid. :class:`ConfigError` when it is not attached."""
    registry = Registry(brain.root)
    with brain.lock():
        folder = brain.weights
        listed = read_list(folder)
        uids = [one["expert_uid"] for one in listed if expert_id in (one["expert_id"], one["expert_uid"])]
        if not uids:
            for entry in registry.entries():  # an attachment that was cut short
                if entry.expert_id == expert_id and brain.name in entry.attached_to:
                    registry.note_detached(expert_id, brain.name)
                    return entry.expert_uid
            names = ", ".join(one["expert_id"] for one in listed) or "none"
            raise ConfigError(f"expert {expert_id} is not attached to {brain.path.name}; attached are: {names}.")
        write_list(folder, [one for one in listed if one["expert_uid"] != uids[0]])
    for entry in registry.entries():
        if entry.expert_uid == uids[0]:
            registry.note_detached(entry.expert_id, brain.name)
    return str(uids[0])
