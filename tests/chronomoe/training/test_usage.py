"""Records of expert usage: each assignment counted once, whatever happens to the run."""

import pytest

from chronomoe.errors import ConfigError
from tests.chronomoe.training.building import build_model, build_trainer, kill_at, records


def test_usage_is_counted_once_whatever_happens_to_the_run(tmp_path):
    settings = {"max_steps": 12, "usage_every_n_steps": 5, "save_every_n_steps": 4}
    counted = {}
    for name in ("whole", "stopped", "killed"):
        trainer = build_trainer(tmp_path / name, **settings)
        if name == "killed":
            kill_at(trainer, 9)
        else:
            trainer.stop_after = 8 if name == "stopped" else None
            trainer.train()
        if name != "whole":
            trainer = build_trainer(tmp_path / name, build_model(seed=4), **settings)
            trainer.load_checkpoint("latest")
            trainer.train()
        counted[name] = {one["step"]: one["total_tokens"] for one in records(tmp_path / name, "expert_usage")}
    tokens = 4 * 16
    # 22 sequences: the sixth batch of an epoch has only two.
    assert sum(counted["whole"].values()) == 12 * tokens - 2 * tokens // 2
    assert list(counted["whole"]) == [5, 10, 12]
    assert list(counted["stopped"]) == [5, 8, 10, 12]
    assert sum(counted["stopped"].values()) == sum(counted["whole"].values())
    assert counted["killed"] == counted["whole"]


def test_sums_of_another_form_are_refused(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1, usage_every_n_steps=5)
    (usage,) = [one for one in trainer.callbacks if one.name == "usage"]
    good = {"assignments": [[1.0, 2.0]], "probability": [[0.5, 0.5]], "tokens": [3.0]}
    usage.load_state_dict(good)
    for spoiled in ({"tokens": [3.0]}, good | {"tokens": []}, good | {"assignments": [[1.0]]}, good | {"more": []}):
        with pytest.raises(ConfigError):
            usage.load_state_dict(spoiled)
    assert usage.state_dict() == good
