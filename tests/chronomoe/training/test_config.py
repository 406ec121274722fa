"""TrainingConfig: the seed's fields and defaults, refusals by name, no heavy import."""

import dataclasses
import subprocess
import sys

import pytest

from chronomoe.errors import ConfigError
from chronomoe.training.config import TrainingConfig


def test_the_fields_and_defaults_of_the_seed():
    seed = {
        "learning_rate": 1e-4, "weight_decay": 0.01, "max_epochs": 10, "batch_size": 8,
        "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "lambda_balance": 0.01, "lambda_coherence": 0.001,
        "lambda_valley": 0.0001, "initial_kappa": 0.5, "final_kappa": -0.3, "kappa_warmup_steps": 1000,
        "kappa_schedule": "cosine", "use_coherence_gating": True, "min_coherence": 0.2, "gating_strength": 0.5,
        "checkpoint_dir": "checkpoints", "save_every_n_steps": 1000, "save_chronovisor_state": True,
    }  # fmt: skip
    assert seed.items() <= dataclasses.asdict(TrainingConfig()).items()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("max_steps", 0), ("learning_rate", float("nan")), ("learning_rate", -1.0),
        ("initial_kappa", 1.5), ("final_kappa", float("nan")), ("kappa_schedule", "cosin"), ("precision", "fp8"),
        ("lr_schedule", "none"), ("gating_strength", 2.0), ("keep_last", -1),
        ("lr_warmup_steps", -1), ("seed", -1), ("lambda_balance", float("inf")),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        TrainingConfig(**{field: value})


def test_round_trip_and_unknown_names():
    config = TrainingConfig(learning_rate=3e-3, max_steps=7)
    assert TrainingConfig.from_json(config.to_json(), exact=True) == config
    with pytest.raises(ConfigError, match="learning_rat"):
        TrainingConfig.from_json({"learning_rat": 1})


def test_importing_it_is_cheap():
    code = "import sys; import chronomoe.training.config, chronomoe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
