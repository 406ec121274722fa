"""What a run leaves on disk and continues from: which checkpoints there are, what is in one, which are kept."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from chronomoe.control.checkpoint import ChronovisorCheckpoint
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import whole_directory
from chronomoe.tensors import read_tensors, save_tensors
from chronomoe.training import checkpoint
from chronomoe.training.config import TrainingConfig
from chronomoe.training.optimizer import apply_settings
from chronomoe.training.run_control import RunControl

Rng = tuple[dict[str, Tensor], dict[str, Any]]


@dataclasses.dataclass
class RunState:
    """Where a run is: all of it goes into trainer.json."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Micro-batches of the current epoch already used."""
    tokens: int = 0
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    """Loss terms summed since the last log line."""
    summed: int = 0
    goals: str = ""
    """Which goals are on, by the trainer's ``goals_key``."""


@dataclasses.dataclass(kw_only=True)
class RunFiles:
    """The checkpoints of one run and everything that moves in it, except its :class:`RunState`."""

    config: TrainingConfig
    accelerator: Accelerator
    model: Any
    control: RunControl
    optimizer: Any
    schedule: Any
    save_extra: Callable[[Path], Any] | None
    continued_from: Path | None = None
    """The checkpoint loaded, until the next save."""

    @property
    def folder(self) -> Path:
        """Where the step_N checkpoints are."""
        return Path(self.config.checkpoint_dir)

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        found = checkpoint.list_checkpoints(self.folder)
        return found[-1] if found else None

    def find(self, name: str) -> Path:
        """A checkpoint by ``"latest"``, its name in the folder, or a path."""
        if name == "latest":
            if (latest := self.latest()) is None:
                raise CheckpointError(f"there is no checkpoint in {self.folder} to continue from.")
            return latest
        mine = self.folder / name
        return mine if mine.is_dir() or not Path(name).is_dir() else Path(name)

    def refuse_foreign(self, state: RunState) -> None:
        """A run that begins anew must not write over one that is there."""
        if state.step == 0 and self.continued_from is None and (latest := self.latest()) is not None:
            raise ConfigError(
                f"{self.folder} holds the checkpoints of another run; load_checkpoint({latest.name!r}) continues it, "
                "another checkpoint_dir begins a new one."
            )

    def save(self, state: RunState, total_steps: int) -> Path:
        """Write ``step_<N>`` whole, then drop checkpoints beyond ``keep_last`` (never the best, never this one).

        The first save after continuing from an older checkpoint moves the ones after it to ``superseded/``: they belong
        to a history that this run has left.
        """
        path = self.folder / f"step_{state.step}"
        rng: list[Rng] = gather_object([checkpoint.pack_rng()])
        if self.accelerator.is_main_process:
            if self.continued_from is not None:
                checkpoint.set_aside_later(self.folder, self.continued_from)
                self.continued_from = None
            with whole_directory(path, replace=True) as work:
                self._write(work, state, total_steps, rng)
            checkpoint.remove_old(self.folder, self.config.keep_last, state.best_step)
        self.accelerator.wait_for_everyone()
        return path

    def _write(self, work: Path, state: RunState, total_steps: int, rng: list[Rng]) -> None:
        checkpoint.save_model(self.model, work, control=self.config.save_chronovisor_state)
        tensors, groups = checkpoint.pack_optimizer(self.optimizer)
        save_tensors(work / "optimizer.safetensors", tensors)
        for rank, (generators, _) in enumerate(rng):
            save_tensors(work / f"rng_{rank}.safetensors", generators)
        content = {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "state": dataclasses.asdict(state),
            "config": dataclasses.asdict(self.config),
            "total_steps": total_steps,
            "optimizer_groups": groups,
            "optimizer_tensors": sorted(tensors),
            "schedule": self.schedule.state_dict(),
            "control": self.control.state_dict(),
            "goal_bias": [] if self.control.controller is None else self.control.controller.steering.goal_bias.tolist(),
            "rng": [others for _, others in rng],
        }
        checkpoint.write_trainer_state(work, content)
        if self.save_extra is not None:
            self.save_extra(work)

    def load(self, path: Path) -> tuple[RunState, Rng]:
        """Bring everything to where the checkpoint ``path`` was; returns its state and this process's generators."""
        saved = checkpoint.read_trainer_state(path)
        try:
            return self._load(path, saved)
        except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(f"{path / 'trainer.json'} is damaged ({what}); use another checkpoint.") from error

    def _load(self, path: Path, saved: dict[str, Any]) -> tuple[RunState, Rng]:
        rank = self.accelerator.process_index
        if len(saved["rng"]) != self.accelerator.num_processes:
            raise CheckpointError(
                f"{path} was saved by {len(saved['rng'])} processes, this run has {self.accelerator.num_processes}; "
                "continue with as many."
            )
        if wrong := set(saved["state"]) ^ {field.name for field in dataclasses.fields(RunState)}:
            raise KeyError(f"{min(wrong)} is missing or unknown")
        state = RunState(**saved["state"])
        if min(state.step, state.epoch, state.batch, state.tokens, state.skipped, state.summed) < 0:
            raise ValueError("a count is below 0")
        # Files that are missing or do not fit are refused before anything changes.
        geology, controller = None, self.control.controller
        if controller is not None and saved["config"]["save_chronovisor_state"]:
            geology = ChronovisorCheckpoint.load(path)
            geology.refuse_unfit(controller, path)
        moments = read_tensors(path / "optimizer.safetensors")
        if odd := set(moments) ^ set(saved["optimizer_tensors"]):
            raise CheckpointError(f"{path / 'optimizer.safetensors'}: {min(odd)} is missing or unknown.")
        generators = read_tensors(path / f"rng_{rank}.safetensors")
        checkpoint.load_weights(self.model, path)
        if controller is not None:
            controller.reset()
            if geology is None:
                state.goals = ""  # nothing says what was on
            else:
                geology.restore_to_controller(controller, path)
                controller.steering.goal_bias.copy_(torch.tensor(saved["goal_bias"]))
                if geology.record.control != controller.config:
                    controller.release()  # what they had on may be off now
                    self.control.show("  The control layer's settings differ from the checkpoint's; today's apply.")
        self.control.load_state_dict(saved["control"])
        checkpoint.unpack_optimizer(self.optimizer, moments, saved["optimizer_groups"])
        self.schedule.load_state_dict(saved["schedule"])
        apply_settings(self.optimizer, self.schedule, self.model, self.config)
        self.continued_from = path
        # The position is one in samples; with other batches it falls on the one that holds it.
        state.batch = state.batch * saved["config"]["batch_size"] // self.config.batch_size
        return state, (generators, saved["rng"][rank])
