"""Micro-batches of a step, complete or in pieces: long sequences in bounded memory.

A piece sees the keys and values of all pieces before it, without their gradient (truncated backpropagation through
time), at its right positions; each is backpropagated before the next is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from chronomoe.data.windows import IGNORED

Batch = Mapping[str, Tensor]
"""``input_ids`` (batch, sequence), and ``attention_mask`` and ``labels`` (not shifted; -100 is ignored) if any."""


def labels_of(batch: Batch) -> Tensor:
    """The batch's labels; without any, its own tokens where they are not padding."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" in batch:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch["input_ids"]


def routed_tokens(batch: Batch) -> Tensor:
    """How many tokens of a batch are not padding, scalar."""
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum().cpu()


def calls(
    batches: Sequence[Batch], labels: Sequence[Tensor], chunk_size: int | None
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The forwards of one step, and whether each is the last.

    Each must be drawn only after the backward pass of the one before, so the last is known by counting.
    """
    total = sum(1 if chunk_size is None else -(-label.shape[1] // chunk_size) for label in labels)
    made = chain.from_iterable(pieces(batch, label, chunk_size) for batch, label in zip(batches, labels, strict=True))
    for number, call in enumerate(made, 1):
        yield call, number == total


def pieces(batch: Batch, labels: Tensor, chunk_size: int | None) -> Iterator[dict[str, Any]]:
    """What the model is called with, one call after another; ``labels`` (batch, sequence) are not shifted.

    A micro-batch without ``chunk_size``, or not longer than it, is one call.
    """
    length = labels.shape[1]
    if chunk_size is None or length <= chunk_size:
        yield {**batch, "labels": labels, "use_cache": False}
        return
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    cache = ChunkCache()
    for start in range(0, length, chunk_size):
        end = min(start + chunk_size, length)
        piece: dict[str, Any] = {
            "input_ids": batch["input_ids"][:, start:end],
            "labels": labels[:, start:end],
            "shift_labels": targets[:, start:end].contiguous(),
            "past_key_values": cache,
            "use_cache": False,
        }
        if "attention_mask" in batch:
            piece["attention_mask"] = batch["attention_mask"][:, :end]
        yield piece
        cache.commit()


class ChunkCache(DynamicCache):
    """What earlier pieces of a long training text leave behind, without gradient (truncated backpropagation).

    A forward reads it and does not change it; :meth:`commit`, after the backward pass, adds what the piece wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The past followed by the new keys and values."""
        self._written[layer_idx] = key_states.detach(), value_states.detach()
        past: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if past is None or past.keys is None:
            return key_states, value_states
        return torch.cat([past.keys, key_states], dim=-2), torch.cat([past.values, value_states], dim=-2)

    def commit(self) -> None:
        """The piece is done: it is part of the past."""
        for slot, (keys, values) in sorted(self._written.items()):
            super().update(keys, values, slot)
        self._written.clear()
