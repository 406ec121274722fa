"""Prepared text on disk: token shards that are memory-mapped, their index, and what they hold.

One directory is one data set:

    data.json                          settings, domains, sizes, content fingerprint; see store_info.py
    tokenizer/                         the tokenizer the text was encoded with
    <domain>/{train,heldout}.bin       little-endian token ids, each document followed by one separator
    <domain>/{train,heldout}.idx.npy   int64 (documents, 2): token offset and UTF-8 bytes of each document

The idea: text is tokenized once; from then on a corpus of any size costs no memory and opens at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronomoe.data.store_info import DomainInfo, SplitSize, StoreInfo, damaged, read_info
from chronomoe.errors import DataError

_COUNT_CHUNK = 1 << 22


class TokenShardWriter:
    """Appends documents to <folder>/<split>.bin as a stream; only the index is kept in memory."""

    def __init__(self, folder: Path, split: str, *, dtype: str, separator_id: int) -> None:
        self._index_path = folder / f"{split}.idx.npy"
        self._file = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 (it lives as long as the writer)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._separator = separator_id
        self._index: list[tuple[int, int]] = []
        self._tokens = 0
        self._hash = blake2b(digest_size=16)

    def append(self, documents: Sequence[Sequence[int]], num_bytes: Sequence[int]) -> None:
        """Add a batch of documents (token ids without separator) and the UTF-8 length of each."""
        for ids, size in zip(documents, num_bytes, strict=True):
            data = np.asarray([*ids, self._separator], dtype=self._dtype).tobytes()
            self._index.append((self._tokens, size))
            self._tokens += len(ids) + 1
            self._hash.update(data)
            self._file.write(data)

    def close(self) -> tuple[SplitSize, str]:
        """Write the index; returns the sizes and the content hash."""
        self._file.close()
        index = np.asarray(self._index, dtype="<i8").reshape(-1, 2)
        np.save(self._index_path, index, allow_pickle=False)
        self._hash.update(index.tobytes())
        size = SplitSize(tokens=self._tokens, documents=len(index), bytes=int(index[:, 1].sum()))
        return size, self._hash.hexdigest()

    def __enter__(self) -> TokenShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class TokenShard:
    """One side of a domain: the packed stream and where its documents start."""

    tokens: NDArray[Any]
    """Token ids, every document followed by a separator (a read-only memory map)."""
    offsets: NDArray[np.int64]
    """(documents + 1,): document i is tokens[offsets[i] : offsets[i + 1]], separator last."""
    num_bytes: NDArray[np.int64]
    """(documents,): UTF-8 bytes of each document's text."""

    @classmethod
    def open(cls, folder: Path, split: str, size: SplitSize, dtype: str) -> TokenShard:
        """Map a shard after checking that its files are as long as recorded."""
        path, item = folder / f"{split}.bin", np.dtype(dtype).newbyteorder("<")
        try:
            found = path.stat().st_size
            index = np.load(folder / f"{split}.idx.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise damaged(folder, error) from error
        if found != size.tokens * item.itemsize or index.shape != (size.documents, 2):
            raise DataError(
                f"{path} is truncated or altered: its size is not the recorded one; prepare the data again."
            )
        # An empty file cannot be mapped.
        tokens = np.memmap(path, dtype=item, mode="r") if found else np.empty(0, item)
        return cls(tokens, np.append(index[:, 0], size.tokens).astype(np.int64), index[:, 1])

    def __len__(self) -> int:
        return len(self.num_bytes)

    def documents_within(self, max_tokens: int | None) -> int:
        """How many whole documents from the first fit into ``max_tokens``; at least one."""
        if max_tokens is None:
            return len(self)
        return max(1, int(np.searchsorted(self.offsets[1:], max_tokens, side="right")))

    def document(self, index: int) -> NDArray[Any]:
        """The token ids of one document, without its separator."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]


@dataclass(frozen=True)
class TokenStore:
    """A prepared data set, open for reading."""

    path: Path
    info: StoreInfo

    @classmethod
    def open(cls, path: Path | str) -> TokenStore:
        """Open and check a directory that data preparation wrote."""
        store = cls(Path(path), read_info(Path(path)))
        if sum(domain.train.tokens + domain.heldout.tokens for domain in store.info.domains) == 0:
            raise DataError(f"The prepared data in {path} is empty; prepare it again from a source that holds text.")
        _ = store.domains
        return store

    @cached_property
    def domains(self) -> dict[str, Domain]:
        """Every domain by name, in order."""
        dtype = self.info.dtype
        return {
            info.name: Domain(
                info,
                TokenShard.open(self.path / info.name, "train", info.train, dtype),
                TokenShard.open(self.path / info.name, "heldout", info.heldout, dtype),
            )
            for info in self.info.domains
        }

    def domain(self, name: str) -> Domain:
        """One domain by name."""
        if name not in self.domains:
            raise DataError(f"{self.path} has no domain {name!r}; it has {', '.join(self.domains)}.")
        return self.domains[name]

    def only(self, name: str) -> TokenStore:
        """The same data with one of its domains."""
        one = replace(self.domain(name).info, weight=1.0)
        return TokenStore(self.path, replace(self.info, domains=type(self.info.domains)([one])))

    def favouring(self, names: Sequence[str], factor: float) -> TokenStore:
        """The same data, in which these domains weigh ``factor`` times as much; :class:`DataError` for unknown ones."""
        chosen = {self.domain(name).info.name for name in names}
        wanted = [one.weight * (factor if one.name in chosen else 1) for one in self.info.domains]
        domains = [
            replace(one, weight=weight / sum(wanted)) for one, weight in zip(self.info.domains, wanted, strict=True)
        ]
        return TokenStore(self.path, replace(self.info, domains=type(self.info.domains)(domains)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry the whole corpus to every loader process; path and description are enough.
        return TokenStore, (self.path, self.info)


@dataclass(frozen=True)
class Domain:
    """One domain of an open store."""

    info: DomainInfo
    train: TokenShard
    heldout: TokenShard


def content_fingerprint(settings: Sequence[object], shard_hashes: Sequence[str]) -> str:
    """Identity of a prepared data set: its settings and every token in it."""
    return blake2b(json.dumps([settings, shard_hashes]).encode(), digest_size=16).hexdigest()


def unigram_bits_per_byte(store: TokenStore, max_tokens: int | None = None) -> dict[str, float]:
    """Held-out bits per byte of a model that knows only how frequent each token is, on the text of heldout_windows.

    The floor any trained model must beat: training frequencies (add-one) mixed by domain weight.
    """
    probabilities = np.zeros(store.info.vocab_size)
    for domain in store.domains.values():
        counts = _text_token_counts(domain.train.tokens, store.info) + 1
        probabilities += domain.info.weight * counts / counts.sum()
    bits = -np.log2(probabilities)
    result = {}
    for name, domain in store.domains.items():
        if len(shard := domain.heldout):
            documents = shard.documents_within(max_tokens)
            counts = _text_token_counts(shard.tokens[: shard.offsets[documents]], store.info)
            result[name] = float(counts @ bits / shard.num_bytes[:documents].sum())
    return result


def _text_token_counts(tokens: NDArray[Any], info: StoreInfo) -> NDArray[np.int64]:
    counts = np.zeros(info.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _COUNT_CHUNK):
        counts += np.bincount(tokens[start : start + _COUNT_CHUNK], minlength=info.vocab_size)
    counts[info.separator_id] = 0
    return counts
