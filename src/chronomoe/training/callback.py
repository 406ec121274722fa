"""Callback: what happens around the steps of a run, and what callbacks share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from chronomoe.training.config import TrainingConfig
from chronomoe.training.report import Reporter
from chronomoe.training.step import StepResult
from chronomoe.training.trainer_file import RunState


class Callback:
    """Takes part in a run at six events; each does nothing until a subclass says otherwise.

    What moves in a callback belongs into checkpoints, so that a resumed run is the run that never stopped: small things
    as its state, kept under its ``name`` in trainer.json, large ones in files of its own.
    """

    name: ClassVar[str] = ""
    """The key of its state in a checkpoint; a callback without one has no state."""

    def before_training(self) -> None:
        """The first step of this call of ``train`` comes next."""

    def after_backward(self, step: StepResult) -> None:
        """The gradient of ``step`` is complete and clipped; the optimizer has not moved yet."""

    def after_step(self, step: StepResult) -> None:
        """The weights have moved, or the step was skipped. A checkpoint is saved before an error here ends the run."""

    def after_training(self) -> None:
        """The run is finished or was stopped after a step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, ready for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; :class:`ConfigError`, before anything changes, for anything else."""

    def save(self, folder: Path) -> None:
        """Write files into the folder of a checkpoint; called in the main process only."""

    def load(self, folder: Path) -> None:
        """Read them in every process, after :meth:`load_state_dict` and before the weights."""


@dataclass(kw_only=True)
class Run:
    """What the callbacks of a run share."""

    config: TrainingConfig
    total_steps: int
    report: Reporter
    state: RunState = field(default_factory=RunState)
    callbacks: list[Callback] = field(default_factory=list)
    """In the order in which each event reaches them."""
    best_step: int | None = None
    """The step with the best evaluation, whose checkpoint is kept."""

    def is_due(self, step: int, every: int) -> bool:
        """Is ``step`` a multiple of ``every``, or the last?"""
        return step % every == 0 or step == self.total_steps
