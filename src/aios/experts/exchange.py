"""Expert files to and from other places: `aios experts export`, `import`."""

from contextlib import suppress
from pathlib import Path

from aios.goal_text import fitted_text
from aios.store.entry import WEIGHTS, ExpertEntry, checkpoint_file, expert_folder, making, weights_path
from aios.store.experts import Registry
from chronomoe.errors import ConfigError
from chronomoe.experts.file import read_expert
from chronomoe.storage import whole_file


def export_expert(root: Path, expert_id: str, out: Path) -> Path:
    """Copy an expert's file to ``out``, checked; :class:`ConfigError` when that exists."""
    file = checkpoint_file(root, Registry(root).get(expert_id))
    if out.is_dir():
        out = out / f"{expert_id}.safetensors"
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another name.")
    read_expert(file)
    with whole_file(out) as copy:
        copy.write(file.read_bytes())
    return out


def import_expert(root: Path, file: Path, expert_id: str | None = None) -> ExpertEntry:
    """Enter an expert file that comes from elsewhere, under its own id or another; it is checked first.

    Raises :class:`ConfigError` when the id is taken by another expert, :class:`CheckpointError` for a damaged file.
    """
    expert, header = read_expert(file)
    expert_id = expert_id or expert.expert_id
    registry, folder = Registry(root), expert_folder(root, expert_id)
    registry.refuse_foreign_weights(expert_id)
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
                    checkpoint_path=weights_path(expert_id),
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
