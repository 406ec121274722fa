"""Tensors in safetensors files: written completely, read with the fault named."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chronomoe.errors import CheckpointError


def remedy(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"use another checkpoint, or move {path} away to continue from the one before."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a tensor file; a missing or damaged one is a :class:`CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"the checkpoint {path.parent} has no {path.name}; {remedy(path.parent)}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy(path.parent)}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors; shared or strided ones are copied first."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
