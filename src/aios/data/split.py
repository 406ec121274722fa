"""Which documents are held out for evaluation, and which of those training nearly repeats.

A text's hash decides its side, so copies land together and adding text moves nothing. Text that is nearly
in the training side would measure memory, not modelling: such held-out documents are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from heapq import heappop, heappush
from math import ceil

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.5
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def text_key(text: str) -> int:
    """64-bit identity of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class _Lowest:
    """The texts with the lowest keys: about ``fraction`` of all, at most ``max_bytes``, at least one, never all."""

    def __init__(self, fraction: float, max_bytes: int) -> None:
        self._threshold, self._max_bytes = int(fraction * 2**64), max_bytes
        self._kept: dict[int, dict[str, None]] = {}
        self._order: list[int] = []
        self._bytes = 0
        self.lowest, self.highest = 1 << 64, -1

    def observe(self, key: int, text: str) -> None:
        """See a text; those of one key are kept, or not, together."""
        self.highest = max(self.highest, key)
        if key < self.lowest:
            if self.lowest >= self._threshold:
                self._drop(self.lowest)  # it was kept only for want of a lower one
            self.lowest = key
        elif key >= self._threshold and key != self.lowest:
            return
        if key not in self._kept:
            self._kept[key] = {}
            heappush(self._order, -key)
        texts, size = self._kept[key], len(text.encode())
        if text in texts or (texts and len(self._order) == 1 and self._bytes + size > self._max_bytes):
            return  # a copy, or more of one long text than is evaluated
        texts[text] = None
        self._bytes += size
        while self._bytes > self._max_bytes and len(self._order) > 1:
            self._threshold = -self._order[0]  # more of that text may follow
            self._drop(self._threshold)

    def _drop(self, key: int) -> None:
        if key in self._kept:
            heappop(self._order)
            self._bytes -= sum(len(text.encode()) for text in self._kept.pop(key))

    def keys(self) -> set[int]:
        """The keys that are held out."""
        return set(self._kept) - {self.highest}

    def texts(self, keys: Iterable[int]) -> list[str]:
        """The texts of some keys, in the order of these."""
        return [text for key in sorted(keys) for text in self._kept[key]]


class AllHeldOut:
    """The split of a domain that is only evaluated on."""

    siblings_in_training = False

    def __init__(self, max_bytes: int) -> None:
        self._texts: list[str] = []
        self._room = max_bytes

    def observe(self, text: str) -> None:
        """First pass: see a document."""
        if self._room > 0:
            self._room -= len(text.encode())
            self._texts.append(text)

    def finish(self) -> list[str]:
        """All documents, up to the limit and the one that passes it."""
        return self._texts

    def training_text(self, text: str) -> str | None:
        """Second pass: nothing is trained on."""
        return None


class DomainSplit:
    """Chooses the held-out side of one domain in a single pass over its documents.

    Held out are the texts with the lowest hashes. All pieces of a long text stay together, so that no evaluation text
    continues one that was trained on. Where that would leave too coarse a choice (fewer than ``1 / fraction`` texts)
    pieces are chosen one by one; where there is but one document, its last tenth is held out.
    """

    def __init__(self, fraction: float, max_bytes: int) -> None:
        self._texts, self._pieces = _Lowest(fraction, max_bytes), _Lowest(fraction, max_bytes)
        self._seen: set[int] = set()
        self._cut = False
        self._min_texts = ceil(1 / fraction)
        self._chosen: set[int] = set()
        self._only_document = False

    @property
    def by_document(self) -> bool:
        """Is a long text held out with all of its pieces?"""
        return len(self._seen) >= self._min_texts

    @property
    def siblings_in_training(self) -> bool:
        """Are there held-out pieces whose text is trained on elsewhere?"""
        return self._cut and not self.by_document

    def observe(self, text: str) -> None:
        """First pass: see a document."""
        self._cut = self._cut or hasattr(text, "beginning")
        key = _document_key(text)
        if not self.by_document:
            self._seen.add(key)
        self._texts.observe(key, text)
        self._pieces.observe(text_key(text), text)

    def finish(self) -> list[str]:
        """End of the first pass: the held-out texts, in the order of their hash."""
        chosen = self._texts if self.by_document else self._pieces
        self._only_document = chosen.lowest == chosen.highest
        if self._only_document:
            (text,) = chosen.texts({chosen.lowest})
            tail = text[len(_head(text)) :]
            return [tail] if tail.strip() else []
        self._chosen = chosen.keys()
        return chosen.texts(self._chosen)

    def training_text(self, text: str) -> str | None:
        """Second pass: what of a document is trained on."""
        if self._only_document:
            return _head(text)
        key = _document_key(text) if self.by_document else text_key(text)
        return None if key in self._chosen else text


def _document_key(text: str) -> int:
    return text_key(getattr(text, "beginning", text))


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
