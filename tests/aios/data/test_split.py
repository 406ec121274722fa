import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios.data.plain_text import Piece
from aios.data.split import DomainSplit, NearDuplicates, shingles, text_key

WORDS = [f"word{i}" for i in range(5000)]


def prose(seed, length=200):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def run(texts, fraction=0.05, max_bytes=1_000_000):
    split = DomainSplit(fraction, max_bytes)
    for text in texts:
        split.observe(text)
    held = split.finish()
    return held, [kept for text in texts if (kept := split.training_text(text)) is not None]


def test_the_split_is_about_the_fraction_and_a_partition():
    texts = [prose(i, 10) for i in range(4000)]
    held, trained = run(texts)
    assert 140 < len(held) < 260
    assert sorted(held + trained) == sorted(texts)


def test_the_split_ignores_order_and_survives_added_text():
    texts = [prose(i, 10) for i in range(1000)]
    held, _ = run(texts)
    shuffled, _ = run(random.Random(0).sample(texts, 1000))
    assert shuffled == held
    more, _ = run(texts + [prose(i, 10) for i in range(1000, 1500)])
    assert set(held) <= set(more)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([f"text {i}" for i in range(6)]), min_size=2, max_size=12), st.floats(0.01, 0.49))
def test_copies_share_a_side_and_both_sides_have_text(texts, fraction):
    held, trained = run(texts, fraction)
    assert not set(held) & set(trained)
    assert trained
    if len(set(texts)) > 1:
        assert held
        assert set(held) | set(trained) == set(texts)


def test_the_cap_keeps_the_lowest_hashes_and_returns_the_rest_to_training():
    texts = [prose(i, 10) for i in range(2000)]
    held, trained = run(texts, 0.4, max_bytes=2000)
    assert sum(len(text.encode()) for text in held) <= 2000
    assert len(held) > 5
    assert held == sorted(texts, key=text_key)[: len(held)]
    assert len(held) + len(trained) == len(texts)


def test_a_single_document_gives_its_last_tenth():
    text = prose(0, 1000)
    held, trained = run([text, text])
    assert trained == [text[: -len(held[0])]] * 2
    assert 0.08 < len(held[0]) / len(text) < 0.12
    assert trained[0].endswith(" ")
    assert run(["indivisible"]) == ([], ["indivisible"])
    assert run(["  indivisible"]) == ([], ["  indivisible"])


def dropped(heldout, training):
    duplicates = NearDuplicates(heldout)
    for text in training:
        duplicates.observe(text)
    return duplicates.found.tolist()


def test_near_duplicates_are_found_in_any_one_training_document():
    original, other = prose(1), prose(2)
    edited = original.upper().replace(" ", ", ", 30) + " " + prose(3, 60)
    assert dropped([original, other], [prose(4), edited, prose(5)]) == [True, False]


def test_half_in_one_document_is_too_much_but_quarters_in_two_are_not():
    words = prose(1, 207).split()  # 200 shingles
    half, less = " ".join(words[:107]), " ".join(words[:106])
    assert dropped([" ".join(words)], [half]) == [True]
    assert dropped([" ".join(words)], [less]) == [False]
    quarters = [" ".join(words[:60]), " ".join(words[100:160])]
    assert dropped([" ".join(words)], quarters * 3) == [False]


def test_short_documents_are_compared_whole():
    assert dropped(["A short text!"], ["a short text"]) == [True]
    assert dropped(["a short text"], ["this is a short text inside a longer one"]) == [False]
    assert dropped(["?!"], ["?!", "..."]) == [True]
    assert dropped(["?!"], ["..."]) == [False]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=8, max_size=40))
def test_shingles_are_the_distinct_runs_of_eight_words(words):
    runs = {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
    assert len(shingles(" ".join(words))) == len(runs)


def test_no_heldout_text_and_no_training_text():
    assert dropped([], [prose(1)]) == []
    assert dropped([prose(1)], []) == [False]


@pytest.mark.parametrize("seed", range(3))
def test_against_a_plain_set_computation(seed):
    chance = random.Random(seed)

    def text():
        return " ".join(chance.choices("ab", k=chance.randint(8, 14)))

    def runs(text):
        words = text.split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    heldout, training = [text() for _ in range(60)], [text() for _ in range(40)]
    expected = [any(2 * len(runs(h) & runs(t)) >= len(runs(h)) for t in training) for h in heldout]
    assert 0 < np.mean(expected) < 1
    assert dropped(heldout, training) == expected


def pieces(seed, count):
    beginning = None
    for number in range(count):
        piece = Piece(prose(1000 * seed + number, 20))
        beginning = beginning or piece
        piece.beginning = beginning
        yield piece


def test_the_pieces_of_a_long_text_stay_together():
    texts = [list(pieces(seed, 5)) for seed in range(60)]
    held, trained = run([piece for text in texts for piece in text])
    assert held
    for text in texts:
        assert set(text) <= set(held) or set(text) <= set(trained)


def test_a_long_held_out_text_is_evaluated_up_to_the_cap_and_never_trained_on():
    texts = [list(pieces(seed, 50)) for seed in range(60)]
    held, trained = run([piece for text in texts for piece in text], max_bytes=2000)
    assert 1000 < sum(len(text.encode()) for text in held) <= 2000
    left_out = {piece for text in texts for piece in text} - set(held) - set(trained)
    assert len(left_out) + len(held) == 50
    assert not set(held) & set(trained)


def test_of_few_long_texts_pieces_are_held_out_and_it_says_so():
    split = DomainSplit(0.05, 1_000_000)
    every = [piece for seed in range(3) for piece in pieces(seed, 40)]
    for piece in every:
        split.observe(piece)
    held = split.finish()
    assert split.siblings_in_training
    assert 0 < len(held) < 20
    trained = [text for piece in every if (text := split.training_text(piece)) is not None]
    assert len(held) + len(trained) == 120
