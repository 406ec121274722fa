"""Brain: one trained model and everything about it, in one folder.

artifacts/brains/<family>/<name>/
    run.json             settings of the run and fingerprints of its data and tokenizer
    config.json, model.safetensors, tokenizer.json, ...    the model, once training has ended
    checkpoints/step_N/  resumable states, each a usable model too
    metrics.jsonl        everything measured
    goals.json           goals it is trained under, if any
    experts.json, experts/    experts attached to it, if any
    README.md            model card

Importing this loads no torch.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aios.brains.families import FAMILIES, MIXTRAL, Family, read_config
from aios.brains.run_file import RUN_FILE, RunFile
from aios.store.experts import Registry
from aios.store.goals import Goals
from aios.workspace import Workspace
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import held
from chronomoe.training.config import TrainingConfig
from chronomoe.training.trainer_file import list_checkpoints, read_trainer_file

METRICS = "metrics.jsonl"
_BRAINS = "artifacts/brains"


@dataclass(frozen=True)
class Brain:
    """A brain on disk. A folder that is only a checkpoint is one too: it has weights, but no run of its own.

    Every property is read from disk when asked for, and raises :class:`CheckpointError` for files that are damaged.
    """

    root: Path
    """The workspace."""
    path: Path
    """Its folder; it need not exist."""

    @classmethod
    def at(cls, root: Path, name: str) -> Brain:
        """What ``name`` means: a name in the workspace, family/name, or the path of a brain or checkpoint.

        Raises :class:`ConfigError` for a name that two families have.
        """
        workspace = Workspace(root)
        family, _, last = name.rpartition("/")
        if family in FAMILIES:
            return cls(root, workspace.brain(last, family))
        if "/" not in name and os.sep not in name and name not in (".", ".."):
            named = [place for row in FAMILIES if (place := workspace.brain(name, row)).is_dir()]
            if len(named) > 1:
                choice = " or ".join(f"{place.parent.name}/{name}" for place in named)
                raise ConfigError(f"there are two brains {name}; write {choice}.")
            if named or not Path(name).is_dir():
                return cls(root, named[0] if named else workspace.brain(name, MIXTRAL.name))
        return cls(root, Path(name))

    @classmethod
    def find(cls, root: Path, name: str) -> Brain:
        """A brain that exists, here or elsewhere; :class:`ConfigError` with the names there are, where it does not."""
        brain = cls.at(root, name)
        if not brain.has_run:
            names = ", ".join(cls.names(root)) or "none"
            raise ConfigError(f"there is no brain {name}; brains here: {names}.")
        return brain

    @classmethod
    def of_workspace(cls, root: Path, name: str) -> Brain:
        """A brain of this workspace; :class:`ConfigError` for one that does not exist or is elsewhere."""
        brain = cls.find(root, name)
        if not brain.path.resolve().is_relative_to((root / _BRAINS).resolve()):
            raise ConfigError(f"{brain.path} is not among the brains of this workspace; handle it with your own tools.")
        return brain

    @classmethod
    def all(cls, root: Path) -> list[Brain]:
        """The brains of the workspace by family and name, readable or not."""
        files = [file for row in FAMILIES for file in sorted((root / _BRAINS / row).glob(f"[!.]*/{RUN_FILE}"))]
        return [cls(root, file.parent) for file in files]  # no hidden folder: those are half written or half deleted

    @classmethod
    def names(cls, root: Path) -> list[str]:
        """family/name of each."""
        return [brain.name for brain in cls.all(root)]

    @classmethod
    def free(cls, root: Path, name: str, family: str) -> Brain:
        """The place of a brain to be; :class:`ConfigError` when the name is taken or no plain word."""
        brain = cls(root, Workspace(root).brain(name, family))
        if brain.path.exists():
            raise ConfigError(f"there is a brain {name} already; choose another name or delete it first.")
        return brain

    @property
    def name(self) -> str:
        """family/name."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def has_run(self) -> bool:
        """Does it have a run.json?"""
        return (self.path / RUN_FILE).is_file()

    @property
    def run(self) -> RunFile:
        """The contents of run.json."""
        return RunFile.of(self.path / RUN_FILE)

    @property
    def family(self) -> Family[Any]:
        """Its family, as run.json has it."""
        return FAMILIES[self.run.family]

    @property
    def metrics(self) -> Path:
        """The log of what was measured; several brains may share one."""
        own = self.path / METRICS
        return own if own.is_file() or not self.has_run else Path(self.run.run.log_file or own)

    @property
    def checkpoint_folder(self) -> Path:
        """Where its checkpoints are."""
        return self.path / (self.run.run.checkpoint_dir if self.has_run else TrainingConfig.checkpoint_dir)

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints, oldest first."""
        return list_checkpoints(self.checkpoint_folder)

    @property
    def steps(self) -> int:
        """Training steps of the latest checkpoint, 0 without one."""
        return int(self.checkpoints[-1].name.removeprefix("step_")) if self.checkpoints else 0

    @property
    def is_published(self) -> bool:
        """Has a run ended, and left its model in the folder itself?"""
        return any(self.path.glob("model*.safetensors"))

    @property
    def state(self) -> Literal["empty", "training", "finished"]:
        """Empty has no weights; training has its newest weights in a checkpoint; finished has them in the folder."""
        if not self.checkpoints:
            return "finished" if self.is_published else "empty"
        published = self.run.published_step if self.is_published and self.has_run else None
        return "training" if published is None or self.steps > published else "finished"

    @property
    def weights(self) -> Path:
        """The folder of its newest weights; :class:`CheckpointError` where there are none."""
        if not self.path.is_dir():
            near = ", ".join(sorted(run.parent.name for run in self.path.parent.glob(f"*/{RUN_FILE}"))) or "none"
            raise CheckpointError(f"there is no brain or checkpoint {self.path}; brains beside it: {near}.")
        state = self.state
        if state == "empty":
            raise CheckpointError(f"{self.path} holds no weights yet; train it first.")
        return self.path if state == "finished" else self.checkpoints[-1]

    @property
    def layers_and_experts(self) -> tuple[int, int]:
        """Layers with a router, and experts in each; 0 experts: the brain is dense."""
        # In training a brain has only the configurations of its checkpoints, all alike.
        places = [self.path, *sorted(self.checkpoint_folder.glob("step_*"))]
        place = next((place for place in places if (place / "config.json").is_file()), self.path)
        try:
            family, config = read_config(place)
            return family.layers_and_experts(config)
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{place / 'config.json'} does not say how many layers and experts there are; train the brain or put a "
                "copy back."
            ) from error

    @property
    def data(self) -> Path | None:
        """The prepared data it was trained on, if that is still there."""
        if not self.has_run:
            return None
        named = self.run.run.data
        default = self.family.default_data(self.root, self.path)
        candidates = [named, self.root / named] if named else [default]
        return next((place for place in candidates if (place / "data.json").is_file()), None)

    @property
    def own_data(self) -> Path | None:
        """The same if it is within the workspace: the pages read nothing else."""
        place = self.data
        return place if place is not None and place.resolve().is_relative_to(self.root.resolve()) else None

    def lock(self) -> AbstractContextManager[None]:
        """Hold it for writing; :class:`CheckpointError` if another process does."""
        return held(
            self.path / ".lock", f"another process is training {self.path}; wait for it or choose another name."
        )

    def describe(self) -> dict[str, Any]:
        """Family, training, evaluation and size, for JSON."""
        run, checkpoints, finished = self.run, self.checkpoints, self.state == "finished"
        bits = run.bits_per_byte if finished else None
        if checkpoints and bits is None:
            bits = read_trainer_file(checkpoints[-1]).callbacks["evaluation"]["best_loss"]
        return {
            "family": self.family.name,
            "path": str(self.path),
            "finished": finished,
            "steps": self.steps,
            "bits_per_byte": bits,
            "megabytes": round(sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()) / 1e6, 1),
            "goal": run.run.default_goal,
            "shape": run.run.shape.changes,
            "training": run.training_json(),
        }

    def rename(self, new: str) -> Brain:
        """Give it another name, which the registry and the goals then use; :class:`ConfigError` when that is taken."""
        renamed = Brain.free(self.root, new, self.path.parent.name)
        with self.lock():
            pass  # nobody is training it
        self.path.rename(renamed.path)
        self._moved_to(renamed)
        return renamed

    def delete(self) -> None:
        """Remove it and all its checkpoints, and its name from the registry and the goals."""
        with self.lock():
            pass
        # Out of sight in one step: a removal that is cut short leaves no half a brain under its name.
        grave = self.path.with_name(f".deleted-{self.path.name}")
        if grave.exists():
            shutil.rmtree(grave)
        self.path.rename(grave)
        shutil.rmtree(grave)
        self._moved_to(None)

    def _moved_to(self, now: Brain | None) -> None:
        """Let the registry, and the links of goals, name ``now`` where they name this brain."""
        registry = Registry(self.root)
        for entry in registry.entries():
            if self.name in entry.attached_to:
                registry.note_detached(entry.expert_id, self.name)
                if now is not None:
                    registry.note_attached(entry.expert_id, now.name)
        Goals(self.root).brain_moved(self.name, None if now is None else now.name)


def describe_all(root: Path) -> list[dict[str, Any]]:
    """One entry a brain of the workspace, for JSON; one that cannot be read says why under ``problem``."""
    found = []
    for brain in Brain.all(root):
        named = {"name": brain.path.name, "family": brain.path.parent.name}
        try:
            found.append(brain.describe() | named)
        except CheckpointError as error:
            found.append(named | {"problem": str(error)})
    return found
