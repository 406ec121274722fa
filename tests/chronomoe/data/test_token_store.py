import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe.data.store_info import DomainInfo, SplitSize, StoreInfo, write_info
from chronomoe.data.token_store import TokenShard, TokenShardWriter, TokenStore, unigram_bits_per_byte
from chronomoe.errors import DataError

SEPARATOR = 0


def write_store(path: Path, domains: dict[str, tuple[list[list[int]], list[list[int]]]], vocab_size: int = 300) -> Path:
    """A store whose documents have one byte per token."""
    infos = []
    for name, sides in domains.items():
        (path / name).mkdir(parents=True)
        sizes = []
        for split, documents in zip(("train", "heldout"), sides, strict=True):
            with TokenShardWriter(path / name, split, dtype="uint16", separator_id=SEPARATOR) as writer:
                for document in documents:
                    writer.append([document], [len(document)])
                sizes.append(writer.close()[0])
        infos.append(DomainInfo(name=name, weight=1 / len(domains), train=sizes[0], heldout=sizes[1]))
    info = StoreInfo(
        tokenizer_fingerprint="t",
        vocab_size=vocab_size,
        separator_id=SEPARATOR,
        dtype="uint16",
        domains=tuple(infos),
        fingerprint="f",
    )
    write_info(path, info)
    return path


def test_documents_come_back_with_their_sizes(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "d", {"a": ([[1, 2, 3], [4]], [[5, 6]])}))
    train = store.domain("a").train
    assert [train.document(i).tolist() for i in range(len(train))] == [[1, 2, 3], [4]]
    assert train.tokens.tolist() == [1, 2, 3, SEPARATOR, 4, SEPARATOR]
    assert store.domain("a").info.train == SplitSize(tokens=6, documents=2, bytes=4)
    assert isinstance(train.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        train.tokens[0] = 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 2**32 - 1), max_size=5), max_size=6))
def test_any_documents_round_trip(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("shard")
    with TokenShardWriter(folder, "train", dtype="uint32", separator_id=0) as writer:
        writer.append(documents, [7] * len(documents))
        size, _ = writer.close()
    shard = TokenShard.open(folder, "train", size, "uint32")
    assert [shard.document(i).tolist() for i in range(len(shard))] == documents
    assert shard.num_bytes.sum() == size.bytes == 7 * len(documents)


def test_content_hash_sees_tokens_and_boundaries(tmp_path):
    hashes = set()
    for number, documents in enumerate([[[1, 2]], [[1], [2]], [[1, 3]], [[1, 2]]]):
        (tmp_path / str(number)).mkdir()
        with TokenShardWriter(tmp_path / str(number), "train", dtype="uint16", separator_id=0) as writer:
            writer.append(documents, [1] * len(documents))
            hashes.add(writer.close()[1])
    assert len(hashes) == 3
    with TokenShardWriter(tmp_path, "train", dtype="uint16", separator_id=0) as writer:
        writer.append([[1, 2]], [5])
        assert writer.close()[1] not in hashes, "the byte lengths count too"


def test_pickling_carries_the_path_not_the_corpus(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "d", {"a": ([[1] * 50_000], [])}))
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert pickle.loads(data).domain("a").train.tokens.shape == (50_001,)


def _truncate(path: Path) -> None:
    (path / "a" / "train.bin").write_bytes(b"\1\0")


def _drop_index(path: Path) -> None:
    (path / "a" / "train.idx.npy").unlink()


def _change(key: str, value: object):
    def change(path: Path) -> None:
        content = json.loads((path / "data.json").read_text())
        content[key] = value
        (path / "data.json").write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "truncated"),
        (_drop_index, "damaged"),
        (_change("version", 99), "another format or version"),
        (_change("format", "other"), "another format or version"),
        (_change("domains", [{"name": "../x"}]), "damaged"),
        (_change("domains", []), "empty"),
        (lambda path: (path / "data.json").unlink(), "not prepared data"),
        (lambda path: (path / "data.json").write_text("{"), "damaged"),
    ],
)
def test_a_damaged_store_says_so(tmp_path, damage, message):
    path = write_store(tmp_path / "d", {"a": ([[1, 2, 3]], [[1]])})
    damage(path)
    with pytest.raises(DataError, match=message):
        TokenStore.open(path)


def test_missing_directory_and_unknown_domain(tmp_path):
    with pytest.raises(DataError, match="not prepared data"):
        TokenStore.open(tmp_path / "nowhere")
    store = TokenStore.open(write_store(tmp_path / "d", {"a": ([[1]], [])}))
    with pytest.raises(DataError, match="no domain 'b'; it has a"):
        store.domain("b")


def test_unigram_bits_per_byte_by_hand(tmp_path):
    # Vocabulary 4 (separator 0). a trains on 1,1,1 and b on 2: add-one gives a = (1,4,1,1)/7 and b = (1,1,2,1)/5.
    path = write_store(tmp_path / "d", {"a": ([[1, 1, 1]], [[1, 2]]), "b": ([[2]], [])}, vocab_size=4)
    measured = unigram_bits_per_byte(TokenStore.open(path))
    p1, p2 = (4 / 7 + 1 / 5) / 2, (1 / 7 + 2 / 5) / 2
    assert measured == {"a": pytest.approx(-(math.log2(p1) + math.log2(p2)) / 2)}
