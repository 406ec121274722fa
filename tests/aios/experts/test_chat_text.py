"""Conversations of a base with itself, for the calibration of gates."""

import pytest
import torch

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.experts.chat_text import chat_windows

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"


@pytest.fixture
def loaded(brain):
    return load_brain(Brain(brain.parents[3], brain))


def text(loaded, count=40, length=32):
    return torch.randint(1, loaded.model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def test_the_template_and_the_models_own_answers_are_in_them(loaded):
    loaded.tokenizer.chat_template = TEMPLATE
    windows = chat_windows(loaded.model, loaded.tokenizer, text(loaded))
    assert windows.shape[1] == 32
    assert len(windows) >= 10
    said = loaded.tokenizer.decode(windows.flatten())
    assert said.count("<|assistant|>") >= 10
    begin = loaded.tokenizer("<|user|>", add_special_tokens=False)["input_ids"]
    assert windows[0, : len(begin)].tolist() == begin


def test_without_a_template_there_are_none(loaded):
    loaded.tokenizer.chat_template = None
    assert chat_windows(loaded.model, loaded.tokenizer, text(loaded)) is None


def test_a_model_with_little_room_makes_none(loaded):
    loaded.tokenizer.chat_template = "x" * 4000
    assert chat_windows(loaded.model, loaded.tokenizer, text(loaded)) is None
