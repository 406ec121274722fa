"""Checkpoints of a training run: directories that appear complete or not at all, in safetensors and JSON only.

checkpoints/step_500/
    config.json, model*.safetensors    the model, as save_pretrained writes it: usable by from_pretrained
    chronovisor.safetensors, .json     the control layer, see control/checkpoint.py
    optimizer.safetensors              moments, named "<parameter>.<moment>"
    rng_<rank>.safetensors             random generators of each process
    trainer.json                       where the run is, its settings, the state of callbacks; see trainer_file.py
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from chronomoe import sidecars
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.pretrained import SteeredPreTrained
from chronomoe.storage import whole_directory
from chronomoe.tensors import read_tensors, remedy, save_tensors
from chronomoe.training.callback import Callback, Run
from chronomoe.training.optimizer import pack_optimizer, parameter_names, unpack_optimizer
from chronomoe.training.rng import pack_rng, refuse_wrong_rng
from chronomoe.training.step import StepResult
from chronomoe.training.trainer_file import TRAINER_FILE, TrainerFile, list_checkpoints, read_trainer_file, step_of

OPTIMIZER_FILE = "optimizer.safetensors"
_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_experts_per_tok")


def remove_old(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints (0: none) and the best, and what killed saves left behind."""
    for path in list_checkpoints(folder)[:-keep_last] if keep_last else ():
        if step_of(path) != best_step:
            doomed = path.with_name(f".{path.name}.old")
            os.rename(path, doomed)  # a half-deleted checkpoint must not look like one
            shutil.rmtree(doomed, ignore_errors=True)
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def move_superseded(folder: Path, continued_from: Path) -> None:
    """Move checkpoints from that step on, except itself, to ``superseded/``, under a free name."""
    for path in list_checkpoints(folder):
        if step_of(path) >= step_of(continued_from) and path.resolve() != continued_from.resolve():
            place = folder / "superseded" / path.name
            place.parent.mkdir(exist_ok=True)
            number = 1
            while place.exists():
                number += 1
                place = place.with_name(f"{path.name}.{number}")
            os.rename(path, place)


def save_model(model: Any, folder: Path, *, control: bool) -> None:
    """Save a model as from_pretrained reads it, with what lies beside it; ``control``: the control layer too."""
    if isinstance(model, SteeredPreTrained):
        model.save_pretrained(folder, control=control)
    else:
        model.save_pretrained(folder)
        sidecars.save(model, folder, control=control)


def read_weights(model: Any, path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights for ``model``; :class:`CheckpointError` for another shape."""
    try:
        # First the configuration alone: a foreign one may describe a model that no memory holds.
        theirs_config, mine_config = type(model.config).from_pretrained(path).to_dict(), model.config.to_dict()
        different = [name for name in _SHAPE if theirs_config.get(name) != mine_config.get(name)]
        if different:
            raise CheckpointError(f"{path} belongs to a model of another shape: its {different[0]} does not fit.")
        loaded, info = type(model).from_pretrained(path, output_loading_info=True, dtype=model.dtype)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the weights in {path} cannot be read ({reason}); {remedy(path)}") from error
    wrong = sorted([*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])])
    mine: dict[str, Tensor] = model.state_dict()
    theirs: dict[str, Tensor] = loaded.state_dict()
    wrong += [name for name in mine if name not in theirs or theirs[name].shape != mine[name].shape]
    if wrong:
        raise CheckpointError(f"{path} belongs to a model of another shape: {wrong[0]} does not fit.")
    return theirs


class Checkpoint(Callback):
    """Saves the run when it is time and at its end, and loads what it saved."""

    def __init__(
        self,
        run: Run,
        model: Any,
        optimizer: Any,
        accelerator: Accelerator,
        *,
        save_extra: Callable[[Path], Any] | None = None,
    ) -> None:
        self.run, self.model, self.optimizer = run, model, optimizer
        self.accelerator, self.save_extra = accelerator, save_extra
        self.folder = Path(run.config.checkpoint_dir)
        """Where the step_N checkpoints are."""
        self.continued_from: Path | None = None
        """The checkpoint loaded, until the next save."""
        self._saved_step = 0  # nothing is worth saving before the first step
        self._saved_states: dict[str, Any] | None = None

    def after_step(self, step: StepResult) -> None:
        """Save when it is time."""
        if step.number % self.run.config.save_every_n_steps == 0:
            with self.run.report.paused():
                self.save_step()

    def after_training(self) -> None:
        """Save the last step."""
        self.save_step()

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        found = list_checkpoints(self.folder)
        return found[-1] if found else None

    def find(self, name: str) -> Path:
        """A checkpoint by ``"latest"``, its name in the folder, or a path."""
        if name == "latest":
            if (latest := self.latest()) is None:
                raise CheckpointError(f"there is no checkpoint in {self.folder} to continue from.")
            return latest
        mine = self.folder / name
        return mine if mine.is_dir() or not Path(name).is_dir() else Path(name)

    def refuse_foreign(self) -> None:
        """:class:`ConfigError` for a new run that would write over the checkpoints of another."""
        if self.run.state.step == 0 and self.continued_from is None and (latest := self.latest()) is not None:
            raise ConfigError(
                f"{self.folder} holds the checkpoints of another run; load_checkpoint({latest.name!r}) continues it, "
                "another checkpoint_dir begins a new one."
            )

    def save_step(self) -> Path:
        """Write ``step_<N>`` in one piece, unless it is saved as it is; returns its path.

        Then checkpoints beyond ``keep_last`` are deleted, never the best and never this one. The first save after
        continuing from an older checkpoint moves the ones after it to ``superseded/``: they belong to a history that
        this run has left.
        """
        step, states = self.run.state.step, self._states()
        path = self.folder / f"step_{step}"
        if self._saved_step == step and self._saved_states in (None, states):
            return path
        generators: list[dict[str, Tensor]] = gather_object([pack_rng()])
        if self.accelerator.is_main_process:
            if self.continued_from is not None:
                move_superseded(self.folder, self.continued_from)
                self.continued_from = None
            with whole_directory(path, replace=True) as work:
                self._write(work, states, generators)
            remove_old(self.folder, self.run.config.keep_last, self.run.best_step)
        self.accelerator.wait_for_everyone()
        self.run.report.line(f"Saved checkpoint: {path.name}")
        self.run.report.record({"event": "checkpoint_save", "step": step, "path": path.name})
        self._saved_step, self._saved_states = step, states
        return path

    def _states(self) -> dict[str, dict[str, Any]]:
        states = {callback.name: callback.state_dict() for callback in self.run.callbacks}
        return {name: state for name, state in states.items() if name}

    def _write(self, work: Path, states: dict[str, dict[str, Any]], generators: list[dict[str, Tensor]]) -> None:
        config = self.run.config
        save_model(self.model, work, control=config.save_chronovisor_state)
        for callback in self.run.callbacks:
            callback.save(work)
        tensors = pack_optimizer(self.model, self.optimizer)
        save_tensors(work / OPTIMIZER_FILE, tensors)
        for rank, one in enumerate(generators):
            save_tensors(work / f"rng_{rank}.safetensors", one)
        if self.save_extra is not None:
            self.save_extra(work)
        TrainerFile(
            state=asdict(self.run.state),
            config=config,
            total_steps=self.run.total_steps,
            processes=len(generators),
            optimizer_groups=self._groups(),
            optimizer_tensors=tuple(sorted(tensors)),
            callbacks=states,
        ).write_file(work / TRAINER_FILE)

    def _groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple(map(tuple, parameter_names(self.model, self.optimizer)))

    def load_step(self, path: Path) -> dict[str, Tensor]:
        """Bring the run to where the checkpoint ``path`` was; returns the random generators of this process.

        Files that are missing, damaged or do not fit are refused before a weight changes.
        """
        saved = read_trainer_file(path)
        moments = read_tensors(path / OPTIMIZER_FILE)
        self._refuse_unfit(saved, moments, path)
        generators = read_tensors(path / f"rng_{self.accelerator.process_index}.safetensors")
        refuse_wrong_rng(generators)
        weights = read_weights(self.model, path)
        optimizer_state = unpack_optimizer(self.model, self.optimizer, moments)
        self._load_callbacks(saved, path)
        self.model.load_state_dict(weights, strict=False)
        self.optimizer.load_state_dict(optimizer_state)
        state = self.run.state
        for name, value in saved.state.items():
            setattr(state, name, value)
        # The position is one in samples; with other batches it falls on the one that holds it.
        state.batch = state.batch * saved.config.batch_size // self.run.config.batch_size
        self.continued_from = path
        self._saved_step, self._saved_states = state.step, self._states()
        self.run.report.line(f"Loaded checkpoint: {path.name}")
        return generators

    def _refuse_unfit(self, saved: TrainerFile, moments: dict[str, Tensor], path: Path) -> None:
        processes = self.accelerator.num_processes
        if saved.processes != processes:
            raise CheckpointError(
                f"{path} was saved by {saved.processes} processes, this run has {processes}; continue with as many."
            )
        if saved.config.optimizer != self.run.config.optimizer:
            raise CheckpointError(f"{path} was trained with optimizer={saved.config.optimizer!r}; continue with it.")
        if wrong := set(moments) ^ set(saved.optimizer_tensors):
            raise CheckpointError(f"{path / OPTIMIZER_FILE}: {min(wrong)} is missing or unknown; {remedy(path)}")
        mine, theirs = self._groups(), saved.optimizer_groups
        if mine != theirs:
            wrong = {name for group in mine for name in group} ^ {name for group in theirs for name in group}
            what = f": {min(wrong)} is trained in one of them only" if wrong else ""
            raise CheckpointError(f"{path} was saved by a run that trains other parameters than this one{what}.")

    def _load_callbacks(self, saved: TrainerFile, path: Path) -> None:
        if wrong := set(saved.callbacks) ^ set(self._states()):
            raise CheckpointError(
                f"{path / TRAINER_FILE} is damaged, or written with other callbacks than this run has: the state of "
                f"{min(wrong)!r} is missing or unknown."
            )
        for callback in self.run.callbacks:
            if callback.name:
                try:
                    callback.load_state_dict(saved.callbacks[callback.name])
                except ConfigError as error:
                    raise CheckpointError(f"{path / TRAINER_FILE} is damaged ({error}); {remedy(path)}") from error
            callback.load(path)
