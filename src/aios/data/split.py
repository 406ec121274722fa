"""Which documents are held out for evaluation, and which of those training nearly repeats.

A document's hash decides its side, so copies land together and adding text moves nothing. Text that is nearly
in the training side would measure memory, not modelling: such held-out documents are dropped.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.5
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def text_key(text: str) -> int:
    """64-bit identity of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class DomainSplit:
    """Chooses the held-out side of one domain in a single pass over its documents.

    Held out are the documents with the lowest hashes: about `fraction` of all, at most `max_bytes` of text, at
    least one, never all. A domain that is one document has its last tenth held out instead.
    """

    def __init__(self, fraction: float, max_bytes: int) -> None:
        self._threshold, self._max_bytes = int(fraction * 2**64), max_bytes
        self._chosen: list[tuple[int, str]] = []
        self._keys: set[int] = set()
        self._bytes = 0
        self._lowest: tuple[int, str] | None = None
        self._highest = -1

    def observe(self, text: str) -> None:
        """First pass: see a document."""
        key = text_key(text)
        self._highest = max(self._highest, key)
        if self._lowest is None or key < self._lowest[0]:
            self._lowest = key, text
        if key < self._threshold and key not in self._keys:
            heappush(self._chosen, (-key, text))
            self._keys.add(key)
            self._bytes += len(text.encode())
            while self._bytes > self._max_bytes and len(self._chosen) > 1:
                dropped, evicted = heappop(self._chosen)
                self._keys.discard(-dropped)
                self._bytes -= len(evicted.encode())

    def finish(self) -> dict[int, str]:
        """End of the first pass: the held-out texts by key, in the order of their hash."""
        assert self._lowest is not None, "a domain has documents"
        if self._lowest[0] == self._highest:
            self._keys = set()
            tail = self._lowest[1][len(_head(self._lowest[1])) :]
            return {text_key(tail): tail} if tail.strip() else {}
        held = dict([self._lowest, *((-key, text) for key, text in self._chosen)])
        held.pop(self._highest, None)
        self._keys = set(held)
        return dict(sorted(held.items()))

    def training_text(self, text: str) -> str | None:
        """Second pass: what of a document is trained on."""
        key = text_key(text)
        if self._lowest is not None and self._lowest[0] == self._highest:
            return _head(text)
        return None if key in self._keys else text


def _head(text: str) -> str:
    """The first nine tenths of a text, cut before a word; all of it if it has no two words."""
    cuts = [match.end() for match in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    return text[: min(cuts, key=lambda cut: abs(cut - 0.9 * len(text)))] if cuts else text


def shingles(text: str) -> NDArray[np.uint64]:
    """Distinct hashes of every 8 consecutive words (lower case), or of the whole text if it is shorter."""
    words = _WORD.findall(text.lower()) or [text.strip()]
    codes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
    width = min(SHINGLE_WORDS, len(words))
    count = len(words) - width + 1
    total = np.full(count, width, dtype=np.uint64)
    for offset in range(width):
        total = (total ^ (total >> np.uint64(29))) * _MULTIPLIER + codes[offset : offset + count]
    return np.unique(total)


class NearDuplicates:
    """Finds held-out documents half of whose shingles, or more, occur in some one training document.

    Memory is that of the held-out shingles; training text passes by as a stream.
    """

    def __init__(self, heldout: list[str]) -> None:
        per_document = [shingles(text) for text in heldout]
        sizes = [len(found) for found in per_document]
        every = np.concatenate([np.empty(0, np.uint64), *per_document])
        order = np.argsort(every, kind="stable")
        self._shingles = every[order]
        self._owners = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._needed = np.asarray(list(sizes)) * NEAR_DUPLICATE_SHARE
        self.found = np.zeros(len(sizes), dtype=bool)

    def observe(self, training_text: str) -> None:
        """Compare one training document with every held-out one."""
        if not len(self.found):
            return
        seen = shingles(training_text)
        first = np.searchsorted(self._shingles, seen, side="left")
        hits = np.flatnonzero(self._shingles[np.minimum(first, len(self._shingles) - 1)] == seen)
        if len(hits) == 0:
            return
        last = np.searchsorted(self._shingles, seen[hits], side="right")
        owners = np.concatenate([self._owners[a:b] for a, b in zip(first[hits], last, strict=True)])
        self.found |= np.bincount(owners, minlength=len(self.found)) >= self._needed
