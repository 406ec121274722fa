"""Groups of the optimizer, and the learning rate as transformers computes it."""

import itertools

import pytest
import torch
from transformers import get_scheduler

from chronomoe.errors import CheckpointError
from chronomoe.training import TrainingConfig
from chronomoe.training.optimizer import (
    build_optimizer,
    learning_rate,
    pack_optimizer,
    set_learning_rate,
    unpack_optimizer,
)
from tests.chronomoe.training.building import build_model, build_trainer, records

SCHEDULES = {
    "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "linear": ("linear", None),
    "constant": ("constant_with_warmup", None),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1000, None), (37, 5), (20, 0), (7, 9), (1, None)])
def test_the_learning_rate_is_that_of_transformers_to_the_bit(schedule, total, warmup):
    config = TrainingConfig(learning_rate=3e-4, router_lr_scale=0.3, lr_schedule=schedule, lr_warmup_steps=warmup)
    theirs, mine = (build_optimizer(build_model(), config) for _ in range(2))
    name, extra = SCHEDULES[schedule]
    scheduler = get_scheduler(name, theirs, config.warmup_steps(total), total, scheduler_specific_kwargs=extra)
    for step in range(total + 3):
        set_learning_rate(mine, step, config, total)
        rates = [group["lr"] for group in mine.param_groups]
        assert rates == [group["lr"] for group in theirs.param_groups], step
        assert rates[0] == learning_rate(step, config, total)
        theirs.step()
        scheduler.step()


def test_the_state_is_kept_by_the_names_of_the_parameters():
    model, config = build_model(), TrainingConfig()
    optimizer = build_optimizer(model, config)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    tensors = pack_optimizer(model, optimizer)
    assert {"model.norm.weight.exp_avg", "model.norm.weight.step"} <= set(tensors)
    other = build_optimizer(model, TrainingConfig(adam_beta2=0.5))
    other.load_state_dict(unpack_optimizer(model, other, tensors))
    assert all(torch.equal(value, tensors[name]) for name, value in pack_optimizer(model, other).items())
    assert other.param_groups[0]["betas"] == (0.9, 0.5), "settings are those of today"
    with pytest.raises(CheckpointError, match=r"nothing.exp_avg is for other parameters"):
        unpack_optimizer(model, other, {"nothing.exp_avg": torch.zeros(2)})


def test_decay_is_on_matrices_only(tmp_path):
    trainer = build_trainer(tmp_path, weight_decay=0.3)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.3]
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    assert groups[0]["fused"]
    routers = [layer.mlp.gate.weight for layer in trainer.model.model.layers]
    assert all(any(p is router for p in groups[2]["params"]) for router in routers)


def test_routers_may_learn_at_a_rate_of_their_own(tmp_path):
    trainer = build_trainer(
        tmp_path, learning_rate=1e-2, router_lr_scale=0.5, lr_schedule="constant", lr_warmup_steps=0
    )
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 1e-2, 5e-3]


def test_learning_rate_warms_up_then_falls_to_a_tenth(tmp_path):
    build_trainer(tmp_path, max_steps=20, lr_warmup_steps=4).train()
    rates = [record["lr"] for record in records(tmp_path)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[-1] == pytest.approx(0.001)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
