"""Scenarios of ``tests.long.kills`` that need a model: attaching an expert to a brain, and a brain that is saved."""

import shutil
import subprocess
import sys
from pathlib import Path

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.experts.attach import attach
from chronomoe.experts.listing import FOLDER, read_list
from tests.long.kills import Scenario, State, digest

TINY = (
    *("--hidden-dim", "32", "--num-layers", "1", "--num-experts", "4", "--seq-len", "32", "--batch-size", "2"),
    *("--max-steps", "8", "--eval-tokens", "300", "--eval-every-n-steps", "4", "--save-every-n-steps", "2"),
)
EXPERT = (
    *("--steps", "2", "--batch-size", "2", "--max-seq-len", "32", "--eval-tokens", "300"),
    *("--calibration-windows", "12", "--default-goal", "Read laws"),
)


def aios(root: Path, *words: str) -> None:
    """Run a command in a process of its own, so that no thread of torch is there when this one forks."""
    subprocess.run([sys.executable, "-m", "aios", *words, "--root", str(root)], check=True, capture_output=True)


def begun(folder: Path) -> Path:
    """A workspace with the brain "tiny", of which half is trained; made once."""
    root = folder / "begun"
    if not root.exists():
        aios(root, "init", "--max-bytes", "60000", "--vocab-size", "400")
        aios(root, "train", "--name", "tiny", *TINY, "--stop-after", "4")
    return root


class Attach(Scenario):
    """A trained expert is attached to a finished brain."""

    def build(self, root: Path) -> None:
        shutil.copytree(begun(self.folder.parent), root)
        aios(root, "train", "--name", "tiny", "--resume")
        text = str(root / "training_data/licences")
        aios(root, "experts", "train", "laws", "--brain", "tiny", "--dataset-file", text, *EXPERT)

    def change(self, root: Path) -> None:
        attach(["laws"], Brain.of_workspace(root, "tiny"))

    def state(self, root: Path) -> State:
        brain = Brain.of_workspace(root, "tiny").path
        listed = read_list(brain)
        whole = all((brain / FOLDER / f"{one['expert_uid']}.safetensors").is_file() for one in listed)
        return super().state(root) | {"attached": [one["expert_id"] for one in listed], "copied": whole}

    def is_between(self, state: State) -> bool:
        # The registry comes first; the expert can then be attached again, or detached.
        return state == self.new | {"attached": []}


class Save(Scenario):
    """A brain trains on and saves itself as it goes."""

    def build(self, root: Path) -> None:
        shutil.copytree(begun(self.folder.parent), root)
        aios(root, "experts", "create", "other")

    def change(self, root: Path) -> None:
        from aios.cli import run

        if run(["train", "--root", str(root), "--name", "tiny", "--resume"]) != 0:
            raise RuntimeError("training did not go on")

    def state(self, root: Path) -> State:
        brain = Brain.of_workspace(root, "tiny")
        load_brain(brain)  # what is there is complete
        weights = digest(brain.weights / "model.safetensors")
        return super().state(root) | {"steps": brain.steps, "state": brain.state, "weights": weights}

    def is_between(self, state: State) -> bool:
        # Later than the old: what was saved before the kill stays.
        return super().is_between(state) or self.old["steps"] <= state["steps"] <= self.new["steps"]
