import json
import threading

import pytest
import torch

from aios.brains.brain import Brain
from aios.brains.loaded import LoadedBrain, load_brain
from chronomoe.errors import ConfigError
from chronomoe.hrm import HRMACTv1Config, HRMACTv1ForCausalLM


@pytest.fixture(scope="module")
def loaded(straight):
    return load_brain(Brain.of_workspace(straight, "straight"))


@pytest.mark.parametrize("seed", range(4))
def test_streamed_pieces_are_the_text(loaded, seed):
    settings = {"max_new_tokens": 60, "temperature": 1.5, "top_p": 1.0}
    pieces = list(loaded.stream("The people", seed=seed, **settings))
    torch.manual_seed(seed)
    assert "".join(pieces) == loaded.sample("The people", **settings)
    assert len([piece for piece in pieces if piece]) > 1


def test_nobody_listening_ends_the_generation(loaded):
    before = threading.active_count()
    pieces = loaded.stream("", seed=0, max_new_tokens=2000, temperature=1.5, top_p=1.0)
    next(pieces)
    assert threading.active_count() == before + 1
    pieces.close()
    assert threading.active_count() == before


def test_errors_reach_the_listener(loaded):
    with pytest.raises(ConfigError, match="temperature"):
        list(loaded.stream("", seed=0, temperature=-1))


def test_the_continuation_ends_where_the_model_does(loaded):
    model, tokenizer = loaded.model, loaded.tokenizer
    room = 40
    longest = model.config.max_position_embeddings
    prompt = "x" * (longest - room - 1)
    assert len(tokenizer(prompt)["input_ids"]) == longest - room - 1
    text = loaded.sample(prompt, max_new_tokens=500, temperature=0)
    assert 0 < len(tokenizer(text)["input_ids"]) <= room
    with pytest.raises(ConfigError, match=f"has {longest} tokens"):
        loaded.sample("x" * (longest - 1))


def test_training_mode_is_put_back(loaded):
    model = loaded.model
    model.train()
    loaded.sample(max_new_tokens=1)
    assert model.training
    model.eval()


def test_halting_is_chosen_in_memory_and_not_saved(tmp_path):
    config = HRMACTv1Config(
        vocab_size=64, hidden_size=32, num_attention_heads=2, num_local_experts=2, halt_max_steps=3, expansion=1.0
    )
    loaded = LoadedBrain(Brain(tmp_path, tmp_path), HRMACTv1ForCausalLM(config).eval(), None)
    ids = torch.arange(6)[None]
    loaded.set_halting("max", 2)
    assert torch.all(loaded.model(ids).segments == 2)
    assert loaded.segments_per_token() == ["2.00 of 3 segments a token"]
    assert loaded.segments_per_token() == [], "counted from the last call on"
    loaded.model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["halting"], saved["halt_cap"]) == ("exact", None)
    loaded.set_halting()
    assert (loaded.model.model.halting, loaded.model.model.halt_cap) == ("exact", None)
    with pytest.raises(ConfigError, match="trained with 1 to 3"):
        loaded.set_halting("max", 4)


def test_a_model_without_segments_has_no_halting(loaded):
    loaded.set_halting("exact")
    assert loaded.segments_per_token() == []
    for wrong in (("max", None), (None, 1)):
        with pytest.raises(ConfigError, match="only an HRM brain halts"):
            loaded.set_halting(*wrong)
