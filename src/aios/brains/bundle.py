"""A brain bundle: one trained model and everything about it, in one folder.

artifacts/brains/mixtral/<name>/
    run.json             settings of the run and fingerprints of its data and tokenizer
    config.json, model.safetensors, tokenizer.json, ...    the model, once training has ended
    checkpoints/step_N/  resumable states, each a usable model too
    metrics.jsonl        everything measured
    README.md            model card
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aios.data.tokenizers import tokenizer_fingerprint
from chronomoe.errors import CheckpointError
from chronomoe.storage import write_json

FORMAT, VERSION = "aios-run", 1


@contextmanager
def exclusive(bundle: Path) -> Iterator[None]:
    """Hold a bundle for writing; :class:`CheckpointError` if another process does."""
    bundle.mkdir(parents=True, exist_ok=True)
    lock = FileLock(bundle / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another process is training {bundle}; wait for it or choose another --name.") from None
    with lock:
        yield


def write_run(bundle: Path, run: dict[str, Any], fingerprints: dict[str, str]) -> None:
    """Write ``run.json``."""
    write_json(bundle / "run.json", {"format": FORMAT, "version": VERSION, **run, **fingerprints})


def read_run(bundle: Path) -> dict[str, Any]:
    """Read ``run.json``; :class:`CheckpointError` when it is missing or not ours."""
    file = bundle / "run.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no brain {bundle}; `aios train --name {bundle.name}` makes one.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}).") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT or run.get("version") != VERSION:
        raise CheckpointError(f"{file} was not written by this version of aios.")
    return run


def model_folder(path: Path) -> Path:
    """Where the weights are: the folder itself (bundle or checkpoint), else the latest checkpoint in it."""
    from chronomoe.training.checkpoint import list_checkpoints

    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; give a brain or a checkpoint.")
    if any(path.glob("model*.safetensors")):
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise CheckpointError(f"{path} holds no weights yet; train it first.")
    return checkpoints[-1]


def load_brain(path: Path) -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a bundle or checkpoint.

    Raises :class:`CheckpointError` when weights or tokenizer are missing, damaged, or do not belong together.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from chronomoe import ChronovisorMixtralForCausalLM

    folder = model_folder(path)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; it is no brain.")
    try:
        model = ChronovisorMixtralForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    if len(tokenizer) != model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the model {model.config.vocab_size}; "
            "they do not belong together."
        )
    recorded = _recorded_tokenizer(folder)
    if recorded is not None and recorded != tokenizer_fingerprint(folder):
        raise CheckpointError(
            f"the tokenizer in {folder} is not the one the brain was trained with; put that one back."
        )
    return model, tokenizer


def _recorded_tokenizer(folder: Path) -> str | None:
    for bundle in (folder, folder.parent.parent):
        if (bundle / "run.json").is_file():
            return str(read_run(bundle).get("tokenizer_fingerprint"))
    return None
