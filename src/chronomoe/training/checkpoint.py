"""Checkpoints of a training run: directories that appear whole, in safetensors and JSON only.

checkpoints/step_500/
    config.json, model*.safetensors    the model, as save_pretrained writes it: usable by from_pretrained
    chronovisor.safetensors, .json     the control layer, see geology.py
    optimizer.safetensors              moments, keyed "<parameter number>.<name>"
    rng_<rank>.safetensors             torch generators (and numpy's and Python's, as text in trainer.json)
    trainer.json                       position of the run, optimizer groups, schedule, settings
"""

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from chronomoe import sidecars
from chronomoe.errors import CheckpointError
from chronomoe.pretrained import SteeredPreTrained
from chronomoe.tensors import remedy

FORMAT = "chronomoe-checkpoint"
VERSION = 4
_NAME = re.compile(r"step_(\d+)(\.\d+)?$")
_PARTS = (
    "format", "version", "state", "config", "total_steps", "optimizer_groups", "optimizer_tensors", "schedule",
    "control", "goal_bias", "rng",
)  # fmt: skip
_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_experts_per_tok")


def step_of(path: Path) -> int:
    """The step a checkpoint directory is named after, -1 for another name."""
    match = _NAME.match(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The step_N checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.glob("step_*") if path.is_dir() and step_of(path) >= 0), key=step_of)


def remove_old(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints (0: none) and the best, and what killed saves left behind."""
    for path in list_checkpoints(folder)[:-keep_last] if keep_last else ():
        if step_of(path) != best_step:
            doomed = path.with_name(f".{path.name}.old")
            os.rename(path, doomed)  # a half-deleted checkpoint must not look like one
            shutil.rmtree(doomed, ignore_errors=True)
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside_later(folder: Path, continued_from: Path) -> None:
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


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as tensors by name and JSON-ready groups."""
    state = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": torch.as_tensor(value).contiguous()
        for number, entry in state["state"].items()
        for name, value in entry.items()
    }
    return tensors, state["param_groups"]


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Restore what :func:`pack_optimizer` made; a different set of parameters is a :class:`CheckpointError`."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        for key, tensor in tensors.items():
            number, name = key.split(".", 1)
            # The moments of an 8-bit optimizer have names and shapes of their own.
            if name.startswith("exp_avg") and tensor.shape != parameters[int(number)].shape:
                raise ValueError(f"{key} has the shape {list(tensor.shape)}")
            state.setdefault(int(number), {})[name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"the checkpoint's optimizer state is for other parameters: {error}") from error


def pack_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every random generator: torch's as tensors, numpy's and Python's as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda{index}"] = torch.cuda.get_rng_state(index)
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return tensors, {"numpy": [kind, np.asarray(keys).tolist(), *rest], "python": [version, list(words), gauss]}


def unpack_rng(tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
    """Restore what :func:`pack_rng` made."""
    if "cpu" not in tensors:
        raise CheckpointError("the checkpoint's random state is not one of torch's; use another checkpoint.")
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{index}"], index)
    kind, keys, *rest = others["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))


def read_trainer_state(path: Path) -> dict[str, Any]:
    """``trainer.json`` of a checkpoint, its format checked."""
    file = path / "trainer.json"
    if not path.is_dir():
        near = ", ".join(found.name for found in list_checkpoints(path.parent)) or "none"
        raise CheckpointError(f"there is no checkpoint {path}; in {path.parent} there are: {near}.")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint of a training run: it has no trainer.json.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); {remedy(path)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by chronomoe; give the folder of one of its checkpoints.")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path} has checkpoint version {state.get('version')}, this chronomoe reads {VERSION}.")
    if wrong := sorted(set(state) ^ set(_PARTS)):
        raise CheckpointError(f"{file} is damaged ({wrong[0]} is missing or unknown); {remedy(path)}")
    return state


def save_model(model: Any, folder: Path, *, control: bool) -> None:
    """Save a model as from_pretrained reads it, with what lies beside it; ``control``: the control layer too."""
    if isinstance(model, SteeredPreTrained):
        model.save_pretrained(folder, control=control)
    else:
        model.save_pretrained(folder)
        sidecars.save(model, folder, control=control)


def load_weights(model: Any, path: Path) -> None:
    """Load a checkpoint's weights into ``model`` in place; another shape is a :class:`CheckpointError`."""
    try:
        # First the configuration alone: a foreign one may describe a model that no memory holds.
        theirs_config, mine_config = type(model.config).from_pretrained(path).to_dict(), model.config.to_dict()
        different = [name for name in _SHAPE if theirs_config.get(name) != mine_config.get(name)]
        if different:
            raise CheckpointError(f"{path} belongs to a model of another shape: its {different[0]} does not fit.")
        loaded, info = type(model).from_pretrained(path, output_loading_info=True, dtype=model.dtype)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {path} cannot be read ({_brief(error)}); {remedy(path)}") from error
    wrong = sorted([*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])])
    mine, theirs = model.state_dict(), loaded.state_dict()
    wrong += [name for name in mine if name not in theirs or theirs[name].shape != mine[name].shape]
    if wrong:
        raise CheckpointError(f"{path} belongs to a model of another shape: {wrong[0]} does not fit.")
    model.load_state_dict(theirs, strict=False)


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_trainer_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``trainer.json``; numbers survive exactly."""
    (path / "trainer.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
