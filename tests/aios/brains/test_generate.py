import threading

import pytest
import torch

from aios.brains.bundle import load_brain
from aios.brains.generate import sample_text, stream_text
from chronomoe.errors import ConfigError


@pytest.fixture(scope="module")
def loaded(straight):
    return load_brain(straight / "artifacts/brains/mixtral/straight")


@pytest.mark.parametrize("seed", range(4))
def test_streamed_pieces_are_the_text(loaded, seed):
    settings = {"max_new_tokens": 60, "temperature": 1.5, "top_p": 1.0}
    pieces = list(stream_text(*loaded, "The people", seed=seed, **settings))
    torch.manual_seed(seed)
    assert "".join(pieces) == sample_text(*loaded, "The people", **settings)
    assert len([piece for piece in pieces if piece]) > 1


def test_nobody_listening_ends_the_generation(loaded):
    before = threading.active_count()
    pieces = stream_text(*loaded, "", seed=0, max_new_tokens=2000, temperature=1.5, top_p=1.0)
    next(pieces)
    assert threading.active_count() == before + 1
    pieces.close()
    assert threading.active_count() == before


def test_errors_reach_the_listener(loaded):
    with pytest.raises(ConfigError, match="temperature"):
        list(stream_text(*loaded, "", seed=0, temperature=-1))


def test_the_continuation_ends_where_the_model_does(loaded):
    model, tokenizer = loaded
    room = 40
    longest = model.config.max_position_embeddings
    prompt = "x" * (longest - room - 1)
    assert len(tokenizer(prompt)["input_ids"]) == longest - room - 1
    text = sample_text(model, tokenizer, prompt, max_new_tokens=500, temperature=0)
    assert 0 < len(tokenizer(text)["input_ids"]) <= room
    with pytest.raises(ConfigError, match=f"has {longest} tokens"):
        sample_text(model, tokenizer, "x" * (longest - 1))


def test_training_mode_is_put_back(loaded):
    model, tokenizer = loaded
    model.train()
    sample_text(model, tokenizer, max_new_tokens=1)
    assert model.training
    model.eval()
