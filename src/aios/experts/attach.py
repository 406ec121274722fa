"""Attach experts of the workspace to brains, detach them, and keep brains in step with the registry.

A brain's own files are never written: experts.json and experts/ beside them say who is attached, and how the gates of
several are fitted to one another. The experts' own files stay as they are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.data.tokenizers import tokenizer_fingerprint
from aios.store.entry import ExpertEntry, checkpoint_file, now
from aios.store.experts import Registry
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.experts.attachment import attach_expert
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.file import base_fingerprint, read_expert, refuse_misfit
from chronomoe.experts.listing import FOLDER, gates_name, read_list, write_list
from chronomoe.experts.together import fit_together, load_gates, opened_on, save_gates
from chronomoe.storage import whole_file


def attach(expert_ids: Sequence[str], brain: Brain, *, force: bool = False) -> list[ExpertEntry]:
    """Attach experts to a brain on disk, behind their gates, beside those attached already; all checks come first.

    The gates of all experts of the brain are then fitted to one another. ``force`` lets an expert of another base or
    tokenizer pass if its shapes fit, and is recorded. Raises :class:`ConfigError` for an unknown expert or one attached
    already, :class:`CheckpointError` for an expert that is damaged or does not fit, or a brain in use.
    """
    registry = Registry(brain.root)
    entries = [registry.get(expert_id) for expert_id in dict.fromkeys(expert_ids)]
    files = [checkpoint_file(brain.root, entry) for entry in entries]
    with brain.lock():
        if brain.state != "finished":
            raise CheckpointError(
                f"{brain.path.name} is still in training; finish it (--resume) before you attach an expert."
            )
        folder = brain.path
        experts = [_read(file, entry) for file, entry in zip(files, entries, strict=True)]
        listed = read_list(folder)
        for entry in entries:
            if any(one["expert_uid"] == entry.expert_uid for one in listed):
                raise ConfigError(f"expert {entry.expert_id} is attached to {brain.path.name} already.")
        model = load_brain(brain).model
        for expert in experts:
            refuse_misfit(expert.header, model, tokenizer_fingerprint(folder), force=force)
        about_base = {"base_fingerprint": base_fingerprint(model), "base_dtype": str(model.dtype)}
        for expert in experts:
            attach_expert(model, expert)
        fit_together(model.subbrains.attached)
        for expert, file in zip(experts, files, strict=True):
            with whole_file(folder / FOLDER / f"{expert.uid}.safetensors") as copy:
                copy.write(file.read_bytes())
        gates = save_gates(model.subbrains.attached, folder / FOLDER)
        for entry in entries:
            state: dict[str, Any] = {"expert_id": entry.expert_id, "expert_uid": entry.expert_uid}
            state |= {"active": entry.is_active, "frozen": entry.is_frozen, **about_base}
            listed.append(state | {"attached_at": now(), "forced": force})
        # The registry first: an expert it takes for attached can be attached again, or detached; one it does not know
        # of would be left out when the expert is changed.
        noted = [registry.note_attached(entry.expert_id, brain.name) for entry in entries]
        write_list(folder, listed, gates)
        return noted


def _read(file: Path, entry: ExpertEntry) -> DomainExpert:
    expert, header = read_expert(file)
    expert.header = header
    if expert.uid != entry.expert_uid or header["training"] != entry.training_config:
        raise CheckpointError(
            f"{file} is not what the registry says, as if training or an import had been cut short at its end; "
            f"train {entry.expert_id} again."
        )
    expert.expert_id = entry.expert_id
    return expert


def detach(expert_ids: Sequence[str], brain: Brain) -> list[str]:
    """Take experts off a brain on disk; returns their uids. :class:`ConfigError` when one is not attached.

    The gates of those that stay are fitted to one another again; one that is left alone has its own.
    """
    registry = Registry(brain.root)
    with brain.lock():
        folder = brain.weights
        listed = read_list(folder)
        gone = [uid for expert_id in dict.fromkeys(expert_ids) for uid in _uids(expert_id, listed, brain, registry)]
        staying = [one for one in listed if one["expert_uid"] not in gone]
        if len(staying) < len(listed):
            experts = [_attached(folder, one) for one in staying]
            fit_together(experts)
            write_list(folder, staying, save_gates(experts, folder / FOLDER))
    for entry in registry.entries():
        if entry.expert_uid in gone:
            registry.note_detached(entry.expert_id, brain.name)
    return gone


def _attached(folder: Path, entry: dict[str, Any]) -> DomainExpert:
    """An expert of a brain's list, from the brain's own copy."""
    expert, _ = read_expert(folder / FOLDER / f"{entry['expert_uid']}.safetensors")
    expert.expert_id, expert.active = entry["expert_id"], bool(entry.get("active", True))
    return expert


def gates_against(brain: Brain) -> list[dict[str, Any]]:
    """Where which gate of a brain's experts opens; see :func:`chronomoe.experts.together.opened_on`.

    :class:`ConfigError` for a brain without experts, or experts that keep no samples.
    """
    folder = brain.weights
    listed = read_list(folder)
    if not listed:
        raise ConfigError(f"no expert is attached to {brain.name}; `aios experts attach` does it.")
    experts = [_attached(folder, one) for one in listed]
    if (gates := gates_name(folder)) is not None:
        load_gates(experts, folder / FOLDER / gates)
    if not (rows := opened_on(experts)):
        raise ConfigError(f"the experts of {brain.name} keep no samples of their domains; train them again.")
    return rows


def _uids(expert_id: str, listed: list[dict[str, Any]], brain: Brain, registry: Registry) -> list[str]:
    """The uid of an expert that the list or, where an attachment was cut short, the registry has at this brain."""
    uids = [one["expert_uid"] for one in listed if expert_id in (one["expert_id"], one["expert_uid"])]
    known = [one for one in registry.entries() if one.expert_id == expert_id and brain.name in one.attached_to]
    if found := uids[:1] or [one.expert_uid for one in known]:
        return found
    names = ", ".join(one["expert_id"] for one in listed) or "none"
    raise ConfigError(f"expert {expert_id} is not attached to {brain.path.name}; attached are: {names}.")
