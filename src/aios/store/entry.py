"""One expert as a workspace knows it, and where its files are."""

import re
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from aios.workspace import Workspace, plain_name
from chronomoe.errors import CheckpointError
from chronomoe.settings import Bounds, Settings
from chronomoe.storage import finite, held

WEIGHTS = "expert.safetensors"
"""An expert's file in its folder."""
Count = Annotated[int, Bounds(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class ExpertEntry(Settings):
    """What is known of an expert. An empty name, description or category was never given."""

    expert_id: str
    expert_uid: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Its identity; survives renaming and retraining."""
    name: str = ""
    description: str = ""
    category: str = ""
    goals: tuple[str, ...] = ()
    """Texts of the goals linked to it, in the order in which they were linked."""
    created_at: str = ""
    last_trained: str | None = None
    version: Count = 0
    """How often it was trained; 0: it has no weights."""
    training_datasets: tuple[str, ...] = ()
    performance_metrics: dict[str, Any] = field(default_factory=dict)
    total_activations: Count = 0
    avg_routing_weight: float = 0.0
    """Mean over ``total_activations``."""
    is_active: bool = True
    is_frozen: bool = False
    parent_expert_id: str | None = None
    child_expert_ids: tuple[str, ...] = ()
    """Follows from the parents of the others."""
    model_architecture: str = "feedforward"
    checkpoint_path: str = ""
    """From the root of the workspace, with forward slashes."""
    base_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    attached_to: tuple[str, ...] = ()
    """Names of brains, as family/name."""
    training_config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of registry.json that this version does not know, kept as they are."""

    def __post_init__(self) -> None:
        pass  # the database is strict: only what comes from elsewhere is checked

    def checked(self) -> Self:
        """The same entry; :class:`ConfigError` names the first value that cannot be."""
        super().__post_init__()
        return self

    def to_json(self) -> dict[str, Any]:
        """The entry as registry.json has it; null for numbers that JSON does not know."""
        known = {name: value for name, value in vars(self).items() if name not in ("extra", "_given")}
        values: dict[str, Any] = finite(known | {key: value for key, value in self.extra.items() if key not in known})
        return values


def now() -> str:
    """The time as registry.json has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def expert_folder(root: Path, expert_id: str) -> Path:
    """Where an expert's files are; :class:`ConfigError` for an id that is not a plain word."""
    return Workspace(root).experts / plain_name(expert_id)


def weights_path(expert_id: str) -> str:
    """Where an expert's weights are, from the root of the workspace: its ``checkpoint_path``."""
    return (expert_folder(Path(), expert_id) / WEIGHTS).as_posix()


def checkpoint_file(root: Path, entry: ExpertEntry) -> Path:
    """The weights of an expert, backslashes read as /.

    Raises :class:`CheckpointError` when it has none yet, or its path is absolute or leaves artifacts/experts.
    """
    path = entry.checkpoint_path.replace("\\", "/")
    if not path:
        raise CheckpointError(f"expert {entry.expert_id} has no weights yet; train it first.")
    file = root / path
    home = Workspace(root).experts.resolve()
    absolute = path.startswith("/") or re.match("[A-Za-z]:", path)
    if absolute or "\0" in path or home not in file.resolve().parents:
        raise CheckpointError(f"the registry says that expert {entry.expert_id} is at {path!r}, outside {home}.")
    return file


def making(root: Path, expert_id: str) -> AbstractContextManager[None]:
    """Hold an expert's file for writing; :class:`CheckpointError` if another process trains or imports it."""
    lock = Workspace(root).experts / ".locks" / f"{plain_name(expert_id)}.lock"
    return held(lock, f"another process is making expert {expert_id}; wait for it.")
