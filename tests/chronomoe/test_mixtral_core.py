"""MixtralConfig: both spellings, derived sizes, refusals by name."""

import pytest
import transformers

from chronomoe import MixtralConfig
from chronomoe.errors import ConfigError


def test_the_seed_names_and_transformers_names_are_the_same_fields():
    config = MixtralConfig(
        vocab_size=100, hidden_dim=64, intermediate_dim=96, num_layers=3, num_experts=6, num_experts_per_token=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_seq_length=128, rope_theta=5000.0,
    )  # fmt: skip
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 96, 3)
    assert (config.num_local_experts, config.num_experts_per_tok, config.max_position_embeddings) == (6, 3, 128)
    assert config.rope_parameters["rope_theta"] == 5000.0
    config.hidden_dim = 32
    assert config.hidden_size == 32


def test_the_example_of_the_seed():
    config = MixtralConfig(vocab_size=32000, hidden_dim=512, num_layers=8, num_experts=8, enable_chronovisor=True)
    assert config.num_attention_heads * config.head_dim == 512
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.intermediate_dim == 1792


def test_defaults_are_the_originals():
    config = MixtralConfig()
    got = (
        config.vocab_size, config.hidden_dim, config.intermediate_dim, config.num_layers, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.max_seq_length, config.num_experts,
        config.num_experts_per_token, config.enable_chronovisor, config.rms_norm_eps,
    )  # fmt: skip
    assert got == (32000, 4096, 14336, 32, 32, 8, 128, 32768, 8, 2, True, 1e-5)
    assert config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ({"num_experts": 2, "num_experts_per_token": 3}, "num_experts_per_token"),
        ({"hidden_dim": 100, "num_attention_heads": 3}, "hidden_dim"),
        ({"hidden_dim": 96, "num_attention_heads": 32}, "head_dim"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8}, "num_key_value_heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_bad_combinations_are_refused_by_name(shape, name):
    with pytest.raises(ConfigError, match=name):
        MixtralConfig(**shape)


@pytest.mark.parametrize("width", [2, 6, 32, 100, 200, 288, 300, 500, 768, 1000, 4096])
def test_heads_are_derived_for_every_even_width(width):
    config = MixtralConfig(hidden_dim=width)
    assert config.head_dim * config.num_attention_heads == width
    assert config.head_dim % 2 == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_attention_heads <= max(1, width // 32)


def test_survives_saving_and_opens_in_plain_transformers(tmp_path):
    config = MixtralConfig(hidden_dim=64, num_layers=1, steering={"capacity_factor": 1.5}, enable_chronovisor=False)
    config.save_pretrained(tmp_path)
    back = MixtralConfig.from_pretrained(tmp_path)
    assert back.to_dict() == config.to_dict()
    assert back.steering == {"capacity_factor": 1.5}
    assert back.enable_chronovisor is False
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == 64
