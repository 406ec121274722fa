"""Experts of the workspace in its brains: attach, detach, and keep brains in step with the registry.

A brain's own files are never written: experts.json and experts/ beside them say who is attached.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios.brains.bundle import exclusive, find_brain, load_brain, model_folder, trained_further
from aios.goal_text import fitted_text
from aios.store.entry import now
from aios.store.experts import WEIGHTS, ExpertEntry, Registry, checkpoint_file, expert_folder, making
from chronomoe.errors import CheckpointError, ChronoMoEError, ConfigError
from chronomoe.storage import whole_file

if TYPE_CHECKING:
    from chronomoe.hosts.capture import RoutingCounts


def attach(root: Path, expert_id: str, brain: str, *, force: bool = False) -> ExpertEntry:
    """Attach an expert to a brain on disk, behind its gate, after those attached already; all checks come first.

    ``force`` lets an expert of another base or tokenizer pass if its shapes fit, and is recorded. Raises
    :class:`ConfigError` for an unknown expert or brain or one attached already, :class:`CheckpointError` for an expert
    that is damaged or does not fit, or a brain in use.
    """
    from aios.brains.shelf import brain_name, existing_brain
    from aios.data.tokenizers import tokenizer_fingerprint
    from chronomoe.experts.attachment import attach_expert
    from chronomoe.experts.file import base_fingerprint, read_expert, refuse_misfit
    from chronomoe.sidecars import FOLDER, read_list, write_list

    registry = Registry(root)
    entry, bundle = registry.get(expert_id), existing_brain(root, brain)
    file = checkpoint_file(root, entry)
    with exclusive(bundle):
        folder = _finished(bundle)
        expert, header = read_expert(file)
        if expert.uid != entry.expert_uid or header["training"] != entry.training_config:
            raise CheckpointError(
                f"{file} is not what the registry says, as if training or an import had been cut short at its end; "
                f"train {expert_id} again."
            )
        listed = read_list(folder)
        if any(one["expert_uid"] == expert.uid for one in listed):
            raise ConfigError(f"expert {expert_id} is attached to {brain} already.")
        model, _ = load_brain(bundle)
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
        entry = registry.note_attached(expert_id, brain_name(bundle))
        write_list(folder, [*listed, record])
        return entry


def detach(root: Path, expert_id: str, brain: str) -> str:
    """Take an expert off a brain on disk; returns its uid. :class:`ConfigError` when it is not attached."""
    from aios.brains.shelf import brain_name, existing_brain
    from chronomoe.sidecars import read_list, write_list

    registry, bundle = Registry(root), existing_brain(root, brain)
    with exclusive(bundle):
        folder = model_folder(bundle)
        listed = read_list(folder)
        uids = [one["expert_uid"] for one in listed if expert_id in (one["expert_id"], one["expert_uid"])]
        if not uids:
            for entry in registry.entries():  # an attachment that was cut short
                if entry.expert_id == expert_id and brain_name(bundle) in entry.attached_to:
                    registry.note_detached(expert_id, brain_name(bundle))
                    return entry.expert_uid
            names = ", ".join(one["expert_id"] for one in listed) or "none"
            raise ConfigError(f"expert {expert_id} is not attached to {brain}; attached are: {names}.")
        write_list(folder, [one for one in listed if one["expert_uid"] != uids[0]])
    for entry in registry.entries():
        if entry.expert_uid == uids[0]:
            registry.note_detached(entry.expert_id, brain_name(bundle))
    return str(uids[0])


def change(root: Path, action: Callable[..., ExpertEntry], *arguments: Any) -> ExpertEntry:
    """Do something to an expert in the registry, and tell the brains it is attached to."""
    bundles = [find_brain(root, brain) for brain in Registry(root).get(arguments[0]).attached_to]
    bundles = sorted(bundle for bundle in bundles if bundle.is_dir())  # others were deleted since
    if not bundles:
        return action(*arguments)
    from chronomoe.sidecars import read_list, write_list  # torch: only where a brain must be told

    with ExitStack() as held:
        for bundle in bundles:
            held.enter_context(exclusive(bundle))
        # Before anything is changed: one may be in use, or its list damaged.
        lists = [(folder, read_list(folder)) for folder in map(model_folder, bundles)]
        entry = action(*arguments)
        now_so = {"expert_id": entry.expert_id, "active": entry.is_active, "frozen": entry.is_frozen}
        for folder, listed in lists:
            write_list(folder, [one | now_so if one["expert_uid"] == entry.expert_uid else one for one in listed])
    return entry


def export(root: Path, expert_id: str, out: Path) -> Path:
    """Copy an expert's file to ``out``, checked; :class:`ConfigError` when that exists."""
    from chronomoe.experts.file import read_expert

    file = checkpoint_file(root, Registry(root).get(expert_id))
    if out.is_dir():
        out = out / f"{expert_id}.safetensors"
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another name.")
    read_expert(file)
    with whole_file(out) as copy:
        copy.write(file.read_bytes())
    return out


def bring_in(root: Path, file: Path, expert_id: str | None = None) -> ExpertEntry:
    """Enter an expert file that comes from elsewhere, under its own id or another; it is checked first.

    Raises :class:`ConfigError` when the id is taken by another expert, :class:`CheckpointError` for a damaged file.
    """
    from chronomoe.experts.file import read_expert

    expert, header = read_expert(file)
    expert_id = expert_id or expert.expert_id
    registry, folder = Registry(root), expert_folder(root, expert_id)
    with making(root, expert_id):
        for one in registry.entries():
            if one.expert_uid == expert.uid or one.expert_id == expert_id:
                raise ConfigError(f"there is an expert {one.expert_id} already ({one.expert_uid}); delete it first.")
        data = file.read_bytes()
        with whole_file(folder / WEIGHTS) as copy:
            copy.write(data)
        try:
            return registry.upsert(
                ExpertEntry(
                    expert_id=expert_id,
                    expert_uid=expert.uid,
                    description=f"Imported from {file.name}",
                    goals=tuple(filter(None, (fitted_text(str(goal)) for goal in header["goals"]))),
                    performance_metrics=header["metrics"],
                    checkpoint_path=str(folder / WEIGHTS),
                    base_fingerprint=str(header["base"].get("fingerprint", "")),
                    tokenizer_fingerprint=header["tokenizer_fingerprint"],
                    training_config=header["training"],
                ),
                source="import",
            )
        except BaseException:
            if file.resolve() != (folder / WEIGHTS).resolve():
                (folder / WEIGHTS).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # if there is nothing else in it
            raise


def note_use(root: Path, model: Any, counts: "RoutingCounts") -> list[str]:
    """Add to the registry at how many tokens each attached expert was open; returns a line for each.

    Best effort: what was generated is not lost because the registry cannot be written.
    """
    lines = []
    for expert in getattr(model, "subbrains", {}).values():
        opened, seen = counts.tokens_open[expert.expert_id], counts.tokens_seen[expert.expert_id]
        lines.append(f"{expert.expert_id}: open at {opened} of {seen} tokens")
        if opened:
            with suppress(ChronoMoEError, OSError):
                registry = Registry(root)
                for entry in registry.entries():
                    if entry.expert_uid == expert.uid:
                        registry.record_use(entry.expert_id, opened, expert.mean_mixing)
    return lines


def gate_along(root: Path, expert_id: str, brain: str, text: str) -> dict[str, Any]:
    """What an attached expert's gate makes of a text: its running log-odds at each token, and where it opens."""
    import torch

    from aios.brains.shelf import existing_brain
    from chronomoe.hosts.capture import gate_inputs

    model, tokenizer = load_brain(existing_brain(root, brain))
    if getattr(model, "subbrains", None) is None:
        raise ConfigError(
            f"no expert is attached to {brain}; `aios experts attach {expert_id} --brain {brain}` does it."
        )
    gate = model.subbrains.by_id(expert_id).gate
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError("the text is empty; give some.")
    room = model.config.max_position_embeddings - 1
    tokens = torch.tensor([[tokenizer.eos_token_id, *ids[:room]]], device=model.device)
    with torch.no_grad():
        odds, _ = gate.log_odds(gate.evidence(gate_inputs(model, gate.layers, tokens)))
    return {
        "tokens": [tokenizer.decode([token]) for token in tokens[0].tolist()],
        "log_odds": [round(value, 4) for value in odds[0].tolist()],
        "threshold": float(gate.threshold),
        "open": (odds[0] > gate.threshold).tolist(),
    }


def _finished(bundle: Path) -> Path:
    if not any(bundle.glob("model*.safetensors")) or trained_further(bundle):
        raise CheckpointError(f"{bundle.name} is still in training; finish it (--resume) before you attach an expert.")
    return bundle
