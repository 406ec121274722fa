"""TrainerFile: ``trainer.json`` of a checkpoint, and which checkpoints a folder holds. Imports nothing heavy."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.settings import Count, FileFormat, NonNegativeInt, Settings
from chronomoe.training.config import TrainingConfig

TRAINER_FILE = "trainer.json"
_NAME = re.compile(r"step_(\d+)(\.\d+)?$")


@dataclass
class RunState:
    """Where a run is; every number counts from its very first step."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Micro-batches of the current epoch already used."""
    tokens: int = 0
    skipped: int = 0
    """Steps skipped for a loss or gradient that was not finite."""
    skipped_in_a_row: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainerFile(Settings):
    """``trainer.json`` of a checkpoint."""

    file_format: ClassVar[FileFormat] = FileFormat(
        name="chronomoe-checkpoint",
        version=5,
        remedy="use another checkpoint, or move this one away to continue from the one before",
        outdated="train again, or continue the run with that version",
    )
    state: dict[str, NonNegativeInt]
    """Fields of :class:`RunState`."""
    config: TrainingConfig
    """The run's settings."""
    total_steps: Count
    processes: Count
    """Processes that shared each step."""
    optimizer_groups: tuple[tuple[str, ...], ...]
    """Names of the parameters in each group of the optimizer."""
    optimizer_tensors: tuple[str, ...]
    """Names in optimizer.safetensors."""
    callbacks: dict[str, dict[str, Any]]
    """The state of each callback that has one, by its name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := set(self.state) ^ {field.name for field in fields(RunState)}:
            raise ConfigError(f"state.{min(wrong)} is missing or unknown.")


def step_of(path: Path) -> int:
    """The step a checkpoint directory is named after, -1 for another name."""
    match = _NAME.match(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The step_N checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.glob("step_*") if path.is_dir() and step_of(path) >= 0), key=step_of)


def read_trainer_file(path: Path) -> TrainerFile:
    """``trainer.json`` of the checkpoint ``path``; :class:`CheckpointError` when it is missing, damaged or outdated."""
    if not path.is_dir():
        near = ", ".join(found.name for found in list_checkpoints(path.parent)) or "none"
        raise CheckpointError(f"there is no checkpoint {path}; in {path.parent} there are: {near}.")
    try:
        return TrainerFile.read_file(path / TRAINER_FILE, exact=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint of a training run: it has no {TRAINER_FILE}.") from None
