"""``run.json`` of a brain: the settings of its run, and fingerprints of its data and tokenizer."""

import json
from pathlib import Path
from typing import Any

from aios.brains.settings import SHAPES, BrainTraining, ModelShape, RunSettings
from chronomoe.errors import CheckpointError
from chronomoe.storage import write_json

RUN_FILE = "run.json"
FORMAT, VERSION = "aios-run", 1


def write_run(bundle: Path, run: dict[str, Any], fingerprints: dict[str, str]) -> None:
    """Write ``run.json``."""
    write_json(bundle / RUN_FILE, {"format": FORMAT, "version": VERSION, **run, **fingerprints})


def read_run(bundle: Path) -> dict[str, Any]:
    """Read ``run.json``; :class:`CheckpointError` when it is missing or not ours."""
    file = bundle / RUN_FILE
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
