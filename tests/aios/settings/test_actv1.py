"""Flags of train-actv1: what each means for the run, and which cannot go together."""

from pathlib import Path

import pytest

from aios.settings.actv1 import ENDLESS, ACTv1Run, adjusted_rates, warmup_steps
from aios.settings.expert import ExpertTraining
from aios.settings.train import HRMShape
from chronomoe.errors import ConfigError


def test_every_flag_reaches_its_setting(tmp_path):
    run = ACTv1Run(
        seq_len=64, batch_size=3, gradient_accumulation_steps=2, max_steps=40, learning_rate=1e-4, eval_batches=4,
        seed=7, lambda_balance=0.2, lambda_z=0.3, balance="pi", gradient_checkpointing=False, amp=False, eval_every=5,
        save_every=6, log_every=3, linear=True, start_offset=2, moe_capacity_factor=0, default_goal="be brief",
        use_chunked_training=True, chunk_size=16, stop_file=str(tmp_path / "s"), log_file=str(tmp_path / "l"),
    ).resolved()  # fmt: skip
    wanted = {
        "learning_rate": 1e-4, "router_lr_scale": 0.5, "max_steps": 40, "batch_size": 3, "lr_warmup_steps": 10,
        "gradient_accumulation_steps": 2, "lambda_balance": 0.2, "lambda_z": 0.3, "control": "pi", "precision": "fp32",
        "gradient_checkpointing": False, "chunk_size": 16, "seed": 7, "eval_every_n_steps": 5, "save_every_n_steps": 6,
        "log_every_n_steps": 3, "stop_file": str(tmp_path / "s"), "log_file": str(tmp_path / "l"),
        "kappa_warmup_steps": 4, "kappa_schedule": "cosine", "lr_schedule": "cosine", "optimizer": "adamw",
        "seq_len": 64, "eval_tokens": 4 * 3 * 64, "linear": True, "start_offset": 2, "moe_capacity_factor": None,
        "default_goal": "be brief",
    }  # fmt: skip
    assert {name: getattr(run, name) for name in wanted} == wanted


def test_flags_that_depend_on_others():
    assert ACTv1Run().resolved().control == "full"
    assert ACTv1Run(control_layer=False).canonical().resolved().control == "aux"
    assert ACTv1Run(control_layer=False, balance="pi").canonical().resolved().control == "pi"
    assert ACTv1Run(control_layer=True).canonical().over(ACTv1Run(balance="aux")).balance == "full"
    assert ACTv1Run(auto_adjust_lr=False, learning_rate=0.1).resolved().learning_rate == 0.1
    assert ACTv1Run(learning_rate=0.1).resolved().learning_rate == 1e-3
    assert ACTv1Run(learning_rate=0.1, shape=HRMShape(use_moe=False)).resolved().learning_rate == 0.1
    assert ACTv1Run(model_dtype="bf16").resolved().precision == "bf16"
    assert ACTv1Run(use_8bit_optimizer=True).resolved().optimizer == "adamw8bit"
    assert ACTv1Run().resolved().chunk_size is None
    endless = ACTv1Run(iterate=True, max_steps=30).resolved()
    assert (endless.max_steps, endless.save_every_n_steps, endless.lr_schedule) == (ENDLESS, 30, "constant")
    assert endless.kappa_schedule == "adaptive"
    assert ACTv1Run(iterate=True, dry_run=True, max_steps=30).resolved().max_steps == 30


def test_a_brain_remembers_flags_not_what_follows_from_them():
    saved = ACTv1Run.from_json(ACTv1Run(learning_rate=0.1, batch_size=4, max_steps=20, world_size=1).to_json())
    assert not {"max_epochs", "router_lr_scale", "eval_tokens", "device", "world_size", "dataset_file"} & saved.given
    run = ACTv1Run(resume=True, max_steps=40).over(saved)
    assert run.changes_from(saved) == {"max_steps": (20, 40)}
    assert run.resolved().eval_tokens == 10 * 4 * 128
    assert run.replace(auto_adjust_lr=False).resolved().learning_rate == 0.1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--dataset-file"),
        ({"dataset_file": Path("x"), "anchor_file": Path("x")}, "--expert-id"),
        ({"resume": True, "student_init": Path("x")}, "--student-init is settled"),
        ({"resume": True, "chunk_size": 8}, "--use-chunked-training"),
        ({"resume": True, "model_dtype": "fp16"}, "fp16 is not supported"),
        ({"resume": True, "start_offset": 1, "linear": False}, "--no-linear-dataset"),
        ({"resume": True, "control_layer": False, "balance": "full"}, "contradict"),
    ],
)
def test_flags_that_cannot_go_together(flags, said):
    with pytest.raises(ConfigError, match=said):
        ACTv1Run(**flags).check()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"max_steps": 0}, "^steps is 0; it must be a whole number, at least 1"),
        ({"learning_rate": 0}, "^lr is 0"),
        ({"seq_len": 0}, "^max_seq_len is 0"),
        ({"lambda_balance": -1}, "^lb_coef is -1"),
        ({"batch_size": 0}, "^batch_size is 0"),
        ({"name": "a", "save_dir": Path("b")}, "--brain-name and --save-dir"),
    ],
)
def test_errors_name_the_flag(flags, said):
    with pytest.raises(ConfigError, match=said):
        ACTv1Run(**flags)


def test_what_training_one_expert_takes():
    run = ACTv1Run(dataset_file=Path("text"), expert_id="one", name="a", max_steps=3, root=Path("w"))
    settings = run.as_expert()
    assert settings == ExpertTraining(
        dataset_file=Path("text"), brain="w/artifacts/brains/actv1/a", steps=3, eval_tokens=10 * 8 * 128
    )
    assert run.replace(learning_rate=0.5).as_expert().lr == 0.5
    for flags, name in ({"resume": True}, "resume"), ({"shape": HRMShape(use_moe=False)}, "no-moe"):
        with pytest.raises(ConfigError, match=f"--{name} has no meaning"):
            run.replace(**flags).as_expert()


def test_rates_are_lowered_and_never_raised():
    for lr in (1e-6, 2e-4, 1e-3, 5e-3, 1.0):
        for moe in (True, False):
            rate, scale = adjusted_rates(lr, moe, True)
            assert rate <= lr
            assert scale <= 1
            assert adjusted_rates(lr, moe, False) == (lr, 1.0)
        assert adjusted_rates(lr, False, True) == (lr, 1.0)
        assert adjusted_rates(lr, True, True) == (min(lr, 1e-3), 0.5)
    assert [warmup_steps(n) for n in (3, 50, 200, 10_000)] == [3, 10, 20, 200]
