"""The table of families: each model finds its row, and a saved one is read by its config.json alone."""

import json

import pytest

from aios.brains.brain import Brain
from aios.brains.families import ACTV1, FAMILIES, MIXTRAL, family_of, read_config
from chronomoe import MixtralConfig
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.hrm import HRMACTv1Config


def tiny_mixtral():
    return MixtralConfig(vocab_size=64, hidden_dim=32, num_layers=3, num_experts=5)


def tiny_hrm(**changes):
    shape = {"hidden_size": 32, "num_attention_heads": 2, "h_layers": 1, "l_layers": 2, "num_local_experts": 4}
    return HRMACTv1Config(vocab_size=64, **{**shape, "halt_max_steps": 3, **changes})


CONFIGS = {"mixtral": tiny_mixtral, "actv1": tiny_hrm}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_found_by_name_and_by_model_type(name):
    row = FAMILIES[name]
    assert row.name == name
    assert family_of(row.model_type) is row
    assert row.model_class.config_class.model_type == row.model_type
    assert isinstance(CONFIGS[name](), row.model_class.config_class)


def test_another_model_has_no_row():
    assert family_of("llama") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_configuration_says_how_many_layers_and_experts_there_are(name, tmp_path):
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    family, saved = read_config(tmp_path)
    assert family is FAMILIES[name]
    assert family.layers_and_experts(saved) == {"mixtral": (3, 5), "actv1": (3, 4)}[name]
    assert Brain(tmp_path, tmp_path).layers_and_experts == family.layers_and_experts(saved)
    for key in ("num_local_experts", "num_hidden_layers", "l_layers"):
        saved.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="does not say how many layers"):
        _ = Brain(tmp_path, tmp_path).layers_and_experts


def test_a_dense_model_has_no_experts():
    assert ACTV1.layers_and_experts(tiny_hrm(use_moe=False).to_dict()) == (3, 0)


def test_what_transformers_has_no_model_for_is_not_exported():
    MIXTRAL.check_export(tiny_mixtral())
    ACTV1.check_export(tiny_hrm(halt_max_steps=1, use_moe=False, h_layers=2))
    for change in ({}, {"use_moe": True}, {"window_size": 8}, {"h_layers": 1}, {"pos_encodings": "learned"}):
        plain = {"halt_max_steps": 1, "use_moe": False, "h_layers": 2}
        with pytest.raises(ConfigError, match="cannot be written as one"):
            ACTV1.check_export(tiny_hrm(**({} if not change else plain | change)))


def test_what_depends_on_segments():
    config = tiny_hrm()
    assert (MIXTRAL.segments(tiny_mixtral()), ACTV1.segments(config)) == (1, 3)
    assert ACTV1.layer_names(config, 3) == ["0 (low)", "1 (low)", "2 (high)"]
    cycles = 3 * config.H_cycles
    assert ACTV1.call_counts(config) == {"model.L_module.": cycles * config.L_cycles, "model.H_module.": cycles}


def test_data_that_a_brain_does_not_name(tmp_path):
    bundle = tmp_path / "artifacts/brains/actv1/a"
    assert ACTV1.default_data(tmp_path, bundle) == bundle / "data"
    assert MIXTRAL.default_data(tmp_path, bundle) == tmp_path / "training_data/prepared"
