"""A brain bundle: one trained model and everything about it, in one folder.

artifacts/brains/<family>/<name>/      family: mixtral or actv1
    run.json             settings of the run and fingerprints of its data and tokenizer
    config.json, model.safetensors, tokenizer.json, ...    the model, once training has ended
    checkpoints/step_N/  resumable states, each a usable model too
    metrics.jsonl        everything measured
    README.md            model card
"""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from aios.brains.settings import SHAPES, BrainTraining, ModelShape, RunSettings
from aios.workspace import Workspace
from chronomoe.errors import CheckpointError, ChronoMoEError, ConfigError
from chronomoe.storage import held, write_json

FORMAT, VERSION = "aios-run", 1
METRICS = "metrics.jsonl"


def exclusive(bundle: Path) -> AbstractContextManager[None]:
    """Hold a bundle for writing; :class:`CheckpointError` if another process does."""
    return held(bundle / ".lock", f"another process is training {bundle}; wait for it or choose another name.")


def write_run(bundle: Path, run: dict[str, Any], fingerprints: dict[str, str]) -> None:
    """Write ``run.json``."""
    write_json(bundle / "run.json", {"format": FORMAT, "version": VERSION, **run, **fingerprints})


def brain_names(root: Path) -> list[str]:
    """family/name of each brain of the workspace, readable or not. Imports nothing heavy."""
    home = root / "artifacts/brains"
    found = [file.parent for family in SHAPES for file in sorted((home / family).glob("[!.]*/run.json"))]
    return [f"{bundle.parent.name}/{bundle.name}" for bundle in found]


def find_brain(root: Path, brain: str) -> Path:
    """The folder of a brain: by its name in the workspace, else by its path."""
    workspace = Workspace(root)
    family, _, name = brain.rpartition("/")
    if family in SHAPES:
        return workspace.brain(name, family)
    if "/" not in brain and os.sep not in brain and brain not in (".", ".."):
        named = [found for family in SHAPES if (found := workspace.brain(brain, family)).is_dir()]
        if len(named) > 1:
            raise ConfigError(f"there are two brains {brain}; write mixtral/{brain} or actv1/{brain}.")
        if named or not Path(brain).is_dir():
            return named[0] if named else workspace.brain(brain)
    return Path(brain)


def checkpoint_folder(bundle: Path) -> Path:
    """Where a bundle's checkpoints are."""
    recorded = read_run(bundle)["training"].get("checkpoint_dir") if (bundle / "run.json").is_file() else None
    return bundle / (recorded or "checkpoints")


def read_run(bundle: Path) -> dict[str, Any]:
    """Read ``run.json``; :class:`CheckpointError` when it is missing or not ours."""
    file = bundle / "run.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if bundle.is_dir() and any(bundle.rglob("*.safetensors")):
            raise CheckpointError(f"{bundle} has lost its run.json; put it back or train under another name.") from None
        raise CheckpointError(f"there is no brain {bundle} to continue; leave out --resume to begin it.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); put a copy back or train under another name.") from error
    known = isinstance(run, dict) and (run.get("format"), run.get("version")) == (FORMAT, VERSION)
    parts_there = known and all(isinstance(run.get(part), dict) for part in ("settings", "shape", "training"))
    if not parts_there or not isinstance(run.get("family", ""), str):
        raise CheckpointError(f"{file} was not written by this version of aios.")
    shape = SHAPES.get(run.get("family", "mixtral"), ModelShape)
    parts = {"settings": RunSettings(), "shape": shape(), "training": BrainTraining()}
    wrong = [f"{part}.{name}" for part, default in parts.items() for name in _misfits(run[part], default)]
    wrong += [name for name in ("published_step", "bits_per_byte") if not isinstance(run.get(name), int | float | None)]
    if wrong:
        raise CheckpointError(f"{file} is damaged ({wrong[0]} is not what it should be); put a copy back.")
    return run


def _misfits(values: dict[str, Any], default: object) -> list[str]:
    """Names in ``values`` that the settings ``default`` do not have, or have as something else."""
    wrong = []
    for name, value in values.items():
        usual = getattr(default, name, ...)
        plain = value is None or isinstance(value, str | int | float)
        kind = (int, float) if isinstance(usual, float) else type(usual)
        if usual is ... or not plain or not (usual is None or value is None or isinstance(value, kind)):
            wrong.append(name)
    return wrong


def model_folder(path: Path) -> Path:
    """Where the weights are: the folder itself (bundle or checkpoint), else the latest checkpoint in it."""
    from chronomoe.training.checkpoint import list_checkpoints

    if not path.is_dir():
        near = ", ".join(sorted(run.parent.name for run in path.parent.glob("*/run.json"))) or "none"
        raise CheckpointError(f"there is no brain or checkpoint {path}; brains beside it: {near}.")
    checkpoints = list_checkpoints(checkpoint_folder(path))
    if any(path.glob("model*.safetensors")) and not trained_further(path):
        return path
    if not checkpoints:
        raise CheckpointError(f"{path} holds no weights yet; train it first.")
    return checkpoints[-1]


def trained_further(bundle: Path) -> bool:
    """Was a finished brain continued, so that its latest checkpoint is newer than the model in the bundle?"""
    from chronomoe.training.checkpoint import list_checkpoints

    published = read_run(bundle).get("published_step") if (bundle / "run.json").is_file() else None
    checkpoints = list_checkpoints(checkpoint_folder(bundle))
    if not checkpoints or not any(bundle.glob("model*.safetensors")):
        return False
    return published is None or int(checkpoints[-1].name.removeprefix("step_")) > published


def data_of(root: Path, bundle: Path) -> Path | None:
    """The prepared data a brain was trained on, if it is still there."""
    if not (bundle / "run.json").is_file():
        return None
    named = read_run(bundle)["settings"].get("data")
    candidates = [Path(named), root / named] if named else [bundle / "data", Workspace(root).prepared]
    return next((place for place in candidates if (place / "data.json").is_file()), None)


def own_data(root: Path, bundle: Path) -> Path | None:
    """What :func:`data_of` finds if it is within the workspace: the page reads nothing else."""
    place = data_of(root, bundle)
    return place if place is not None and place.resolve().is_relative_to(root.resolve()) else None


def check_config(folder: Path) -> str:
    """Refuse a folder without the configuration of a brain, which transformers would take for one of 47 billion."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read ({error}).") from error
    if not isinstance(config, dict) or config.get("model_type") not in ("mixtral", "hrm_actv1"):
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a Mixtral or an HRM ACTv1; give the folder of one."
        )
    return str(config["model_type"])


def model_class(model_type: str) -> Any:
    """The class of a brain's model."""
    if model_type == "hrm_actv1":
        from chronomoe.hrm import HRMACTv1ForCausalLM

        return HRMACTv1ForCausalLM
    from chronomoe import ChronovisorMixtralForCausalLM

    return ChronovisorMixtralForCausalLM


def load_brain(path: Path) -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a bundle or checkpoint.

    Raises :class:`CheckpointError` when weights or tokenizer are missing, damaged, or do not belong together.
    """
    from aios.data.tokenizers import tokenizer_fingerprint

    folder = model_folder(path)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; it is no brain.")
    model, tokenizer = load_weights(folder), load_tokenizer(folder)
    refuse_small_vocabulary(model, len(tokenizer), folder)
    recorded = _recorded_tokenizer(folder)
    if recorded is not None and recorded != tokenizer_fingerprint(folder):
        raise CheckpointError(
            f"the tokenizer in {folder} is not the one the brain was trained with; put that one back."
        )
    return model.eval(), tokenizer


def load_weights(folder: Path, **settings: Any) -> Any:
    """The model in a folder of weights; :class:`CheckpointError` when they are damaged or not those of its config."""
    kind = model_class(check_config(folder))
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **settings)
    except ChronoMoEError:
        raise
    except Exception as error:  # whatever the libraries raise for files they do not understand
        raise _unreadable(folder, error) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"the weights in {folder} are not those of its config.json: {missing[0]} is missing.")
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; :class:`CheckpointError` when it is damaged or ends no document."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise _unreadable(folder, error) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer in {folder} has no eos_token; its tokenizer_config.json is not the one.")
    return tokenizer


def refuse_small_vocabulary(model: Any, tokens: int, folder: Path) -> None:
    """A model may have more tokens than its tokenizer (padding of the matrix), never fewer."""
    if model.config.vocab_size < tokens:
        raise CheckpointError(
            f"the tokenizer of {folder} has {tokens} tokens but its model {model.config.vocab_size}; "
            "they do not belong together."
        )


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}, {reason}")


def _recorded_tokenizer(folder: Path) -> str | None:
    for bundle in (folder, folder.parent.parent):
        if (bundle / "run.json").is_file():
            return str(read_run(bundle).get("tokenizer_fingerprint"))
    return None
