"""Keys and values of a model that attends several times per block.

A block attends once in each (segment, cycle), and each of these has its own slot in the cache. A token that has halted
is not computed any more: later segments of its neighbours see the keys and values of its last segment. That is the same
with and without a cache, and lets generation stop as soon as its one token has.

A block that is recomputed in the backward pass (activation checkpointing) gets the answer it got the first time.

Shape suffixes: B batch, S sequence.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class SegmentMemory:
    """Stands where attention expects a cache, for one forward pass; ``cache`` is the real one, if any."""

    def __init__(self, cache: Cache | None, slots_per_segment: int, *, halts: bool) -> None:
        self.cache, self.slots_per_segment, self.halts = cache, slots_per_segment, halts
        self.halted: dict[int, Tensor] = {}
        """Segment -> bool (B, S): tokens that had halted before it."""
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, slot: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, ., head size) that this slot's queries see."""
        halted = self.halted.get(slot // self.slots_per_segment)
        if halted is not None:
            old_keys, old_values = self._written[slot - self.slots_per_segment]
            halted = halted[:, None, :, None]
            keys, values = torch.where(halted, old_keys, keys), torch.where(halted, old_values, values)
        if self.halts:  # else they are never read
            self._written[slot] = keys.detach(), values.detach()
        return (keys, values) if self.cache is None else self.cache.update(keys, values, slot)

    def carry_to(self, first: int, last: int) -> None:
        """All tokens have halted: in segments ``first`` to ``last`` their keys and values stay those of the one before.

        Later tokens, which may run longer, read them there.
        """
        if self.cache is None:
            return
        per_segment = self.slots_per_segment
        for slot in range(first * per_segment, (last + 1) * per_segment):
            self.cache.update(*self._written[(first - 1) * per_segment + slot % per_segment], slot)
