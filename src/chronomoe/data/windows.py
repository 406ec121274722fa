"""Training sequences and held-out windows from prepared tokens.

The idea: sample i is a pure function of (seed, i). Nothing is iterated, so resuming a run is starting at index
n, any number of loader workers gives the same data, and no permutation of a large corpus is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from chronomoe.data.token_store import TokenStore
from chronomoe.errors import ConfigError, DataError

IGNORED = -100
_MASK = (1 << 64) - 1
_CYCLE = 1 << 14
"""Samples after which domain shares repeat exactly; shares are kept to one part in this."""


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Training sequences cut from the packed streams of all domains, mixed by weight.

    Each domain is walked in epochs: a random phase, then every window once in shuffled order. The stream is
    treated as a ring, so the few tokens that fill no window are different ones in each epoch. ``linear`` walks it in
    the order of the text instead, from window ``start`` on.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        seed: int,
        num_samples: int,
        *,
        linear: bool = False,
        start: int = 0,
    ) -> None:
        if sequence_length < 2:
            raise ConfigError(f"--seq-len must be at least 2, not {sequence_length}.")
        self.store, self.sequence_length, self.seed, self.num_samples = store, sequence_length, seed, num_samples
        self.linear, self.start = linear, start
        self._names = list(store.domains)
        weights = [info.weight for info in store.info.domains]
        if not sum(info.train.tokens for info in store.info.domains):
            raise DataError(f"The prepared data in {store.path} is all held out; there is nothing to train on.")
        for info in store.info.domains:
            if info.weight > 0 and info.train.tokens < sequence_length:
                raise DataError(
                    f"Domain {info.name!r} has {info.train.tokens} training tokens, too few to fill one sequence of "
                    f"{sequence_length}; choose shorter sequences (--seq-len, --max-seq-len) or add text to it."
                )
            if linear and info.weight > 0 and start >= info.train.tokens // sequence_length:
                raise DataError(
                    f"Domain {info.name!r} has {info.train.tokens // sequence_length} sequences; start before the last."
                )
        self._slots, self._ranks = _domain_cycle(weights, seed)
        self._per_cycle = np.bincount(self._slots, minlength=len(weights))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        domain, start = self.locate(index)
        tokens = self.store.domains[domain].train.tokens
        window = tokens[start : start + self.sequence_length]
        if len(window) < self.sequence_length:
            window = np.concatenate([window, tokens[: self.sequence_length - len(window)]])
        input_ids = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def locate(self, index: int) -> tuple[str, int]:
        """The domain and the first token of sample `index`."""
        cycle, slot = divmod(index, _CYCLE)
        number = int(self._slots[slot])
        nth = cycle * int(self._per_cycle[number]) + int(self._ranks[slot])
        length = len(self.store.domains[self._names[number]].train.tokens)
        windows = length // self.sequence_length
        if self.linear:
            return self._names[number], (self.start + nth) % windows * self.sequence_length
        epoch, position = divmod(nth, windows)
        key = _mix(_mix(_mix(self.seed) + number) + epoch)
        phase = _mix(key) % length
        return self._names[number], (phase + permuted(position, windows, key) * self.sequence_length) % length


def training_windows(store: TokenStore, length: int, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Training sequences of each domain, (count, length)."""
    found = {}
    for one in store.info.domains:
        data = PackedDataset(store.only(one.name), length, seed, count)
        found[one.name] = torch.stack([data[index]["input_ids"] for index in range(count)])
    return found


def permuted(index: int, size: int, key: int) -> int:
    """Where a keyed pseudorandom permutation of range(size) sends `index`, without storing it.

    A four-round Feistel network permutes the next power of four; values outside the range are walked on.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(key + (round_number << 32) + right) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """splitmix64's finalizer: a well-spread 64-bit hash of an integer, the same on every platform."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _domain_cycle(weights: list[float], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each slot of a cycle: which domain, and how many of that domain came before it in the cycle.

    Stratified sampling: a domain with c slots gets one at a random place in each c-th part of the cycle, so shares
    hold over short stretches and yet no domain locks onto one position of the batch.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if not shares.sum() > 0 or shares.min() < 0:
        raise ConfigError(f"Domain weights must be at least 0 and not all 0, not {weights}.")
    exact = shares / shares.sum() * _CYCLE
    counts = np.where(shares > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    # Largest remainders take the slots that rounding left over; the largest domain gives up any excess.
    spare = max(0, _CYCLE - int(counts.sum()))
    counts[np.argsort(counts - exact, kind="stable")[:spare]] += 1
    counts[np.argmax(counts)] -= counts.sum() - _CYCLE
    domains = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    jitter = np.asarray([_mix(_mix(seed) ^ slot) for slot in range(_CYCLE)], dtype=np.float64) / 2.0**64
    order = np.argsort((ranks + jitter) / counts[domains], kind="stable")
    # Jitter may not reorder a domain against itself, so ranks stay what they say.
    return domains[order], ranks[order]


@dataclass(frozen=True, kw_only=True)
class HeldoutWindows:
    """Held-out text as windows in which every text token is predicted exactly once."""

    input_ids: torch.Tensor
    """(n, T) token ids; the last window is padded with separators."""
    targets: torch.Tensor
    """(n, T) the next token, already shifted; -100 where it is a separator or padding."""
    num_bytes: int
    """UTF-8 bytes of the text predicted: nats / num_bytes / ln 2 is bits per byte."""
    num_text_tokens: int
    """Targets that are not -100."""


def heldout_windows(
    store: TokenStore, domain: str, sequence_length: int, max_tokens: int | None = None
) -> HeldoutWindows:
    """Whole held-out documents of a domain up to a token budget (at least one document)."""
    shard = store.domain(domain).heldout
    if len(shard) == 0:
        raise DataError(
            f"Domain {domain!r} has no held-out text to evaluate on; add more, and more varied, text to it."
        )
    documents = shard.documents_within(max_tokens)
    separator = store.info.separator_id
    # The first document starts as every other does: after a separator.
    targets = np.asarray(shard.tokens[: shard.offsets[documents]], dtype=np.int64)
    inputs = np.concatenate([[separator], targets[:-1]])
    targets = np.where(targets == separator, IGNORED, targets)
    padding = (0, -len(targets) % sequence_length)
    return HeldoutWindows(
        input_ids=torch.from_numpy(np.pad(inputs, padding, constant_values=separator)).view(-1, sequence_length),
        targets=torch.from_numpy(np.pad(targets, padding, constant_values=IGNORED)).view(-1, sequence_length),
        num_bytes=int(shard.num_bytes[:documents].sum()),
        num_text_tokens=int((targets != IGNORED).sum()),
    )
