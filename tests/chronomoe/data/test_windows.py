import pickle
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe.data import windows
from chronomoe.data.store_info import DomainInfo, SplitSize, StoreInfo, write_info
from chronomoe.data.token_store import TokenShardWriter, TokenStore
from chronomoe.data.windows import IGNORED, PackedDataset, heldout_windows, permuted
from chronomoe.errors import ConfigError, DataError


def make_store(path, train, heldout=None, weights=None, separator=0):
    """A store from {domain: documents}; each token counts as two bytes."""
    infos = []
    for name in train:
        (path / name).mkdir(parents=True)
        sizes: list[SplitSize] = []
        for split, documents in (("train", train[name]), ("heldout", (heldout or {}).get(name, []))):
            with TokenShardWriter(path / name, split, dtype="uint16", separator_id=separator) as writer:
                writer.append(documents, [2 * len(document) for document in documents])
                sizes.append(writer.close()[0])
        weight = (weights or dict.fromkeys(train, 1.0))[name]
        infos.append(DomainInfo(name=name, weight=weight, train=sizes[0], heldout=sizes[1]))
    common = {"tokenizer_fingerprint": "t", "separator_id": separator, "dtype": "uint16", "fingerprint": "f"}
    write_info(path, StoreInfo(vocab_size=60_000, domains=tuple(infos), **common))
    return TokenStore.open(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutation_depends_on_its_key_and_mixes():
    a, b = ([permuted(i, 1000, key) for i in range(1000)] for key in (1, 2))
    assert a != b
    assert sum(x == i for i, x in enumerate(a)) < 20
    assert sum(abs(x - y) == 1 for x, y in pairwise(a)) < 20


def test_sample_is_a_function_of_seed_and_index(tmp_path):
    store = make_store(tmp_path / "d", {"a": [list(range(1, 500))], "b": [list(range(600, 900))]})
    first = PackedDataset(store, 16, seed=3, num_samples=200)
    again = PackedDataset(TokenStore.open(tmp_path / "d"), 16, seed=3, num_samples=1000)
    backwards = {i: first[i] for i in reversed(range(200))}
    for i in range(200):
        assert torch.equal(backwards[i]["input_ids"], again[i]["input_ids"])
        assert torch.equal(again[i]["labels"], again[i]["input_ids"])
        assert again[i]["input_ids"].shape == (16,)
    other = PackedDataset(store, 16, seed=4, num_samples=200)
    assert any(not torch.equal(first[i]["input_ids"], other[i]["input_ids"]) for i in range(200))
    with pytest.raises(IndexError):
        first[200]


def test_an_epoch_uses_every_window_once_at_a_new_phase(tmp_path):
    store = make_store(tmp_path / "d", {"a": [list(range(1, 104))]})  # 104 tokens with the separator, 10 windows of 10
    dataset = PackedDataset(store, 10, seed=0, num_samples=1000)
    phases = set()
    for epoch in range(5):
        tokens = torch.cat([dataset[i]["input_ids"] for i in range(10 * epoch, 10 * epoch + 10)]).tolist()
        assert len(set(tokens)) == 100
        phases.add(frozenset(range(104)) - set(tokens))
    assert len(phases) > 1, "each epoch leaves out other tokens"


def test_windows_hold_consecutive_tokens_around_the_ring(tmp_path):
    store = make_store(tmp_path / "d", {"a": [list(range(1, 50))]})  # ids 1..49, separator 0
    dataset = PackedDataset(store, 7, seed=1, num_samples=300)
    for i in range(300):
        ids = dataset[i]["input_ids"]
        assert torch.equal((ids[1:] - ids[:-1]) % 50, torch.ones(6, dtype=torch.long))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 10**6))
def test_domain_shares_hold_over_short_stretches(weights, seed):
    slots, ranks = windows._domain_cycle(weights, seed)
    assert len(slots) == windows._CYCLE
    for length in (64, 1000, windows._CYCLE):
        counts = Counter(slots[:length].tolist())
        for domain, weight in enumerate(weights):
            assert abs(counts[domain] - length * weight / sum(weights)) <= 2 * len(weights)
    for domain in range(len(weights)):
        mine = ranks[slots == domain].tolist()
        assert mine == list(range(len(mine)))


def test_a_favoured_domain_is_drawn_so_many_times_as_often(tmp_path):
    train = {"a": [list(range(1, 500))], "b": [list(range(600, 900))]}
    store = make_store(tmp_path / "d", train, weights={"a": 0.75, "b": 0.25})
    favoured = store.favouring(["b"], 6.0)
    assert [domain.weight for domain in favoured.info.domains] == pytest.approx([1 / 3, 2 / 3])
    data = PackedDataset(pickle.loads(pickle.dumps(favoured)), 16, seed=0, num_samples=3000)
    drawn = Counter(data.locate(index)[0] for index in range(3000))
    assert drawn["b"] / 3000 == pytest.approx(2 / 3, abs=0.01)
    with pytest.raises(DataError, match="no domain 'c'"):
        store.favouring(["c"], 2.0)


def test_text_that_is_all_held_out_can_be_read_but_not_trained_on(tmp_path):
    store = make_store(tmp_path / "d", {"a": []}, {"a": [list(range(1, 50))]})
    assert heldout_windows(store, "a", 16).num_text_tokens == 49
    with pytest.raises(DataError, match="all held out"):
        PackedDataset(store, 16, seed=0, num_samples=1)


def test_weights_zero_and_tiny(tmp_path):
    train = {"a": [[1] * 40], "b": [[2] * 40], "c": [[3] * 4]}
    store = make_store(tmp_path / "d", train, weights={"a": 1.0, "b": 1e-9, "c": 0.0})
    dataset = PackedDataset(store, 8, seed=0, num_samples=windows._CYCLE)
    names = Counter(dataset.locate(i)[0] for i in range(len(dataset)))
    assert names == {"a": windows._CYCLE - 1, "b": 1}


def test_too_little_text_names_the_domain(tmp_path):
    store = make_store(tmp_path / "d", {"a": [[1] * 40], "small": [[2] * 5]})
    with pytest.raises(DataError, match=r"'small' has 6 training tokens.*--seq-len"):
        PackedDataset(store, 8, seed=0, num_samples=1)
    with pytest.raises(ConfigError, match="at least 2"):
        PackedDataset(store, 1, seed=0, num_samples=1)


def test_loader_workers_see_the_same_samples(tmp_path):
    store = make_store(tmp_path / "d", {"a": [list(range(1, 300))]})
    dataset = PackedDataset(store, 16, seed=0, num_samples=12)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    batches = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(batches, torch.stack([dataset[i]["input_ids"] for i in range(12)]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(1, 12))
def test_every_text_token_is_predicted_exactly_once(tmp_path_factory, documents, length):
    store = make_store(tmp_path_factory.mktemp("s") / "d", {"a": [[1]]}, {"a": documents})
    windows = heldout_windows(store, "a", length)
    assert windows.input_ids.shape == windows.targets.shape == (windows.input_ids.shape[0], length)
    inputs, targets = windows.input_ids.flatten(), windows.targets.flatten()
    assert targets[targets != IGNORED].tolist() == [token for document in documents for token in document]
    # What is predicted is what comes next, and the first token of a document comes after a separator.
    shown = targets != IGNORED
    shown[-1] = False
    assert torch.equal(inputs[1:][shown[:-1]], targets[:-1][shown[:-1]])
    assert inputs[0] == 0
    assert windows.num_text_tokens == sum(map(len, documents))
    assert windows.num_bytes == 2 * windows.num_text_tokens


def test_heldout_budget_takes_whole_documents(tmp_path):
    store = make_store(tmp_path / "d", {"a": [[1]], "b": [[1]]}, {"a": [[1, 2, 3], [4, 5], [6]]})
    assert heldout_windows(store, "a", 4, max_tokens=7).num_text_tokens == 5
    assert heldout_windows(store, "a", 4, max_tokens=6).num_text_tokens == 3
    assert heldout_windows(store, "a", 4, max_tokens=1).num_bytes == 6
    with pytest.raises(DataError, match="'b' has no held-out text"):
        heldout_windows(store, "b", 4)


def test_uniform_prediction_costs_what_the_bytes_say(tmp_path):
    store = make_store(tmp_path / "d", {"a": [[1]]}, {"a": [[1, 2, 3], [4, 5]]})
    windows = heldout_windows(store, "a", 3)
    logits = torch.zeros(*windows.input_ids.shape, 256)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.targets.flatten(), reduction="sum")
    # 8 bits a token, 2 bytes a token
    assert nats.item() / windows.num_bytes / torch.log(torch.tensor(2.0)).item() == pytest.approx(4.0)
