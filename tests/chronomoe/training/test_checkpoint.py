"""Checkpoints: bit-exact resume, histories, what stays, what is damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chronomoe import ChronovisorMixtralForCausalLM
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.training.trainer_file import list_checkpoints, read_trainer_file
from tests.chronomoe.training.building import build_model, build_trainer, equal_weights, held_out, kill_at, records


@pytest.mark.parametrize(
    ("accumulation", "save_every", "from_step"),
    [(1, 4, 5), (2, 4, 5), (1, 6, 6)],  # the last one just where an epoch ends
)
def test_resumed_training_is_the_training_that_never_stopped(tmp_path, accumulation, save_every, from_step):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "eval_every_n_steps": 5,
        "save_every_n_steps": save_every,
    }
    windows = {"a": held_out()}
    models = [build_model() for _ in range(2)]
    for model in models:
        model.steering.exploration.fill_(0.5)  # draws from the generator in every forward
    straight = build_trainer(tmp_path / "a", models[0], eval_data=windows, **settings)
    straight.train()
    kill_at(build_trainer(tmp_path / "b", models[1], eval_data=windows, **settings), 7)
    resumed = build_trainer(tmp_path / "b", build_model(seed=9), eval_data=windows, **settings)
    resumed.load_checkpoint("latest")
    assert resumed.state.step == from_step
    resumed.train()
    assert equal_weights(straight.model, resumed.model)
    merged = {record["step"]: record for record in records(tmp_path / "b")}
    assert list(merged.values()) == records(tmp_path / "a")
    assert {r["step"]: r for r in records(tmp_path / "b", "eval")} == {
        r["step"]: r for r in records(tmp_path / "a", "eval")
    }
    for name, value in straight.optimizer.state_dict()["state"].items():
        for key, tensor in value.items():
            assert torch.equal(tensor, resumed.optimizer.state_dict()["state"][name][key])


def test_the_random_state_goes_on_too(tmp_path):
    straight = build_trainer(tmp_path / "a")
    straight.train()
    expected = torch.rand(5)
    resumed = build_trainer(tmp_path / "a")
    resumed.load_checkpoint("step_4")
    resumed.train()
    assert torch.equal(torch.rand(5), expected)


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path):
    first = build_trainer(tmp_path, save_every_n_steps=2)
    first.train()
    resumed = build_trainer(tmp_path, build_model(seed=5), save_every_n_steps=2, keep_last=2)
    resumed.load_checkpoint("step_4")
    assert [path.name for path in list_checkpoints(tmp_path)][-1] == "step_12"  # loading alone moves nothing
    resumed.stop_after = 6
    resumed.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_4", "step_6"]
    assert sorted(p.name for p in (tmp_path / "superseded").iterdir()) == ["step_10", "step_12", "step_6", "step_8"]
    assert resumed.checkpoint.latest().name == "step_6"


def test_all_checkpoints_stay_unless_told_otherwise(tmp_path):
    build_trainer(tmp_path, save_every_n_steps=2).train()
    assert len(list_checkpoints(tmp_path)) == 6


def test_without_the_fields_a_checkpoint_starts_neutral(tmp_path):
    model = build_model()
    model.steering.pressure.fill_(0.1)
    build_trainer(tmp_path, model, max_steps=4, save_chronovisor_state=False).train()
    again = ChronovisorMixtralForCausalLM.from_pretrained(tmp_path / "step_4")
    assert not again.steering.pressure.any()
    resumed = build_trainer(tmp_path, build_model(seed=4))
    resumed.load_checkpoint("step_4")
    assert not resumed.steering.pressure.any()


def test_checkpoints_are_usable_models_and_only_the_last_and_best_stay(tmp_path):
    trainer = build_trainer(tmp_path, save_every_n_steps=2, keep_last=2, eval_data={"a": held_out()},
                            eval_every_n_steps=3)  # fmt: skip
    result = trainer.train()
    steps = {int(path.name[5:]) for path in list_checkpoints(tmp_path)}
    assert {10, 12, result["best_step"]} == steps
    again = ChronovisorMixtralForCausalLM.from_pretrained(tmp_path / "step_12")
    with trainer.controller.deployed():
        assert equal_weights(again, trainer.model)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_loses_nothing_saved(tmp_path, monkeypatch):
    import errno

    from chronomoe.training import checkpoint

    trainer = build_trainer(tmp_path)
    kill_at(trainer, 5)
    save = checkpoint.save_tensors

    def full(path, tensors):
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*untouched"):
        trainer.save_checkpoint()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step_4"]
    resumed = build_trainer(tmp_path, build_model(seed=4))
    resumed.load_checkpoint("step_4")


NORM = "model.norm.weight"


def edited(change):
    def damage(path):
        saved = json.loads(path.read_text())
        change(saved)
        path.write_text(json.dumps(saved))

    return damage


def moments(change):
    def damage(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("rng_0.safetensors", moments(lambda x: x.pop("numpy")), "random state numpy is missing"),
        ("optimizer.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged"),
        ("optimizer.safetensors", lambda path: path.unlink(), "no optimizer.safetensors"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-50]), "cannot be read"),
        ("trainer.json", lambda path: path.write_text("{"), "damaged"),
        ("trainer.json", lambda path: path.write_text('{"format": "x"}'), "not a file of the format"),
        ("trainer.json", lambda path: path.unlink(), "no trainer.json"),
        ("trainer.json", edited(lambda saved: saved["state"].pop("tokens")), "tokens is missing or unknown"),
        ("trainer.json", edited(lambda saved: saved["state"].update(step=-6)), "damaged"),
        ("trainer.json", edited(lambda saved: saved["state"].update(step="6")), "damaged"),
        ("trainer.json", edited(lambda saved: saved.pop("total_steps")), "total_steps is missing"),
        ("trainer.json", edited(lambda saved: saved.update(more=1)), "damaged.*more"),
        ("trainer.json", edited(lambda saved: saved["callbacks"].pop("metrics")), "'metrics' is missing or unknown"),
        ("trainer.json", edited(lambda saved: saved["callbacks"]["metrics"].pop("sums")), "damaged.*sums"),
        ("trainer.json", edited(lambda saved: saved.update(callbacks=[])), "damaged"),
        ("trainer.json", edited(lambda saved: saved.update(config={})), "damaged"),
        ("trainer.json", edited(lambda saved: saved.update(optimizer_groups=None)), "damaged"),
        ("optimizer.safetensors", moments(lambda x: x.update({f"{NORM}.exp_avg": torch.zeros(3)})), "has the shape"),
        ("optimizer.safetensors", moments(lambda x: x.pop(f"{NORM}.exp_avg")), "norm.weight.exp_avg is missing"),
        ("chronovisor.json", edited(lambda saved: saved.update(intent=[])), "intent is .*; it must be text"),
        ("chronovisor.safetensors", lambda path: path.write_bytes(b"x"), "damaged"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, file, damage, message):
    build_trainer(tmp_path, max_steps=4).train()
    damage(tmp_path / "step_4" / file)
    with pytest.raises(CheckpointError, match=message):
        build_trainer(tmp_path).load_checkpoint("step_4")


def test_a_checkpoint_of_another_shape_or_name_is_refused(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(CheckpointError, match="another shape"):
        build_trainer(tmp_path, build_model(hidden_dim=64)).load_checkpoint("step_4")
    with pytest.raises(CheckpointError, match=r"step_99.*there are: step_4"):
        build_trainer(tmp_path).load_checkpoint("step_99")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        build_trainer(tmp_path / "new").load_checkpoint("latest")


def test_settings_given_on_resuming_win(tmp_path):
    settings = {"lr_schedule": "constant", "lr_warmup_steps": 0, "max_steps": 8}
    build_trainer(tmp_path, **settings).train()
    resumed = build_trainer(
        tmp_path, **{**settings, "max_steps": 12, "learning_rate": 3e-4, "weight_decay": 0.5, "adam_beta2": 0.5}
    )
    resumed.load_checkpoint("latest")
    resumed.train()
    assert {record["lr"] for record in records(tmp_path) if record["step"] > 8} == {3e-4}
    first, second, _ = resumed.optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"], first["betas"]) == (0.5, 0.0, (0.9, 0.5))


def test_other_batches_go_on_at_the_same_sample(tmp_path):
    build_trainer(tmp_path, max_steps=2, batch_size=4).train()
    resumed = build_trainer(tmp_path, batch_size=2)
    resumed.load_checkpoint("latest")
    assert resumed.state.batch == 4


def test_a_second_run_does_not_write_over_the_first(tmp_path):
    build_trainer(tmp_path, max_steps=4).train()
    before = (tmp_path / "step_4/model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"another run.*step_4"):
        build_trainer(tmp_path).train()
    assert (tmp_path / "step_4/model.safetensors").read_bytes() == before


def test_superseded_histories_keep_every_checkpoint(tmp_path):
    build_trainer(tmp_path).train()
    for _ in range(2):
        resumed = build_trainer(tmp_path)
        resumed.load_checkpoint("step_4")
        resumed.train()
    names = sorted(path.name for path in (tmp_path / "superseded").iterdir())
    assert names == ["step_12", "step_12.2", "step_8", "step_8.2"]
    again = build_trainer(tmp_path)
    again.load_checkpoint("superseded/step_8.2")
    again.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_4", "step_12"]
    assert "step_8.3" in {path.name for path in (tmp_path / "superseded").iterdir()}


def test_a_failing_evaluation_loses_no_training(tmp_path):
    trainer = build_trainer(tmp_path, eval_data={"a": held_out()}, eval_every_n_steps=3)
    trainer.evaluation.sample = lambda model: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list_checkpoints(tmp_path)[-1].name == "step_3"


@pytest.mark.parametrize("lost", ["kappa", "integral"])
def test_a_checkpoint_that_is_refused_has_changed_no_weight(tmp_path, lost):
    build_trainer(tmp_path, build_model(seed=1)).train()
    rest, tensors = (tmp_path / "step_12" / name for name in ("chronovisor.json", "chronovisor.safetensors"))
    rest.write_text(json.dumps({name: value for name, value in json.loads(rest.read_text()).items() if name != lost}))
    kept = {name: value.clone() for name, value in load_file(tensors).items() if not name.endswith(f".{lost}")}
    save_file(kept, tensors)
    trainer = build_trainer(tmp_path, build_model(seed=2))
    with pytest.raises(CheckpointError, match=lost):
        trainer.load_checkpoint("step_12")
    assert equal_weights(trainer.model, build_model(seed=2))


def test_another_number_of_experts_a_token_is_refused(tmp_path):
    build_trainer(tmp_path, build_model(num_experts_per_tok=2)).train()
    with pytest.raises(CheckpointError, match="num_experts_per_tok"):
        build_trainer(tmp_path, build_model(num_experts_per_tok=1)).load_checkpoint("latest")


@pytest.mark.parametrize("brain", ["mixtral/small/checkpoints/step_4", "actv1/thinker/checkpoints/step_2"])
def test_a_file_of_the_version_before_the_first_release_is_refused(brain):
    folder = Path(__file__).parents[2] / "fixtures/0.1.0/workspace/artifacts/brains" / brain
    assert json.loads((folder / "trainer.json").read_text())["version"] == 4
    with pytest.raises(CheckpointError, match=r"trainer\.json was made by version 0\.1\.0.*; train again"):
        read_trainer_file(folder)
