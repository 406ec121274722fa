"""The random generators of a process as tensors, so that a resumed run draws what it would have drawn."""

import random

import numpy as np
import torch
from torch import Tensor

from chronomoe.errors import CheckpointError


def pack_rng() -> dict[str, Tensor]:
    """The state of every generator: torch's on each device, numpy's, Python's."""
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda{index}"] = torch.cuda.get_rng_state(index)
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, words, next_gauss = random.getstate()
    tensors["numpy"] = torch.tensor([*np.asarray(keys).tolist(), position, has_gauss])
    tensors["numpy_gauss"] = torch.tensor([gauss], dtype=torch.float64)
    tensors["python"] = torch.tensor(words)
    has_next = next_gauss is not None
    tensors["python_gauss"] = torch.tensor([has_next, next_gauss if has_next else 0], dtype=torch.float64)
    return tensors


def refuse_wrong_rng(tensors: dict[str, Tensor]) -> None:
    """:class:`CheckpointError` unless these are states of this machine's kinds of generators."""
    for name, mine in pack_rng().items():
        theirs = tensors.get(name)
        if theirs is None and name.startswith("cuda"):
            continue  # a machine with more devices goes on
        if theirs is None or (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
            raise CheckpointError(f"the checkpoint's random state {name} is missing or wrong; use another checkpoint.")


def unpack_rng(tensors: dict[str, Tensor]) -> None:
    """Restore what :func:`pack_rng` returned."""
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{index}"], index)
    *keys, position, has_gauss = tensors["numpy"].tolist()
    gauss, (has_next, next_gauss) = tensors["numpy_gauss"].item(), tensors["python_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    words = tuple(tensors["python"].tolist())
    random.setstate((random.getstate()[0], words, next_gauss if has_next else None))
