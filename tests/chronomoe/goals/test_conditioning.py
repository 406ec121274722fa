"""Learned conditioning: nothing at first and nothing when off; what is taught is what moves."""

import dataclasses

import pytest
import torch

from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.goals.conditioning import (
    FILE,
    attach_conditioning,
    condition,
    conditioned,
    conditioning_trainee,
    embed,
    load_conditioning,
    save_conditioning,
)
from chronomoe.goals.steer import Goal, turn_off
from tests.chronomoe.everything import differing, everything
from tests.chronomoe.experts.conftest import BASES, VOCAB, build_base

LAWS, TALES = Goal(text="laws", tokens=(3, 4)), Goal(text="tales", tokens=(50, 51))


def rows(low, high, n=4, seed=0):
    return torch.randint(low, high, (n, 16), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def teach(model, steps=40, anchored=True):
    with conditioning_trainee(model, [LAWS, TALES], 1.0) as trainee:
        optimizer = torch.optim.Adam(trainee.parameters(), lr=0.05)
        for step in range(steps):
            number = step % 2
            x = rows(0, 12, seed=step) if number == 0 else rows(40, VOCAB, seed=step)
            anchor = {"anchor_ids": rows(12, 40, seed=step)} if anchored else {}
            output = trainee(input_ids=x, labels=x, goal=torch.full((4,), number), **anchor)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return trainee


@pytest.mark.parametrize("family", BASES)
def test_untaught_or_off_changes_no_bit_and_only_what_is_taught_changes(family):
    model = build_base(family)
    tokens, state = rows(0, VOCAB), everything(model)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    before = logits(model, tokens)
    condition(model, [LAWS])
    assert torch.equal(logits(model, tokens), before)
    condition(model, [])
    teach(model)
    assert model.steering.conditioning.weight.any()
    assert torch.equal(logits(model, tokens), before)  # off: teaching left nothing on
    condition(model, [LAWS])
    assert not torch.equal(logits(model, tokens), before)
    live = model.steering.config
    model.steering.config = dataclasses.replace(live, enabled=False)
    assert torch.equal(logits(model, tokens), before)
    model.steering.config = live
    turn_off(model)
    assert torch.equal(logits(model, tokens), before)
    assert not differing(state, everything(model))
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_goals_average_by_weight_in_the_embedding():
    model = build_base("mixtral")
    laws, tales = (embed(model, [goal]) for goal in (LAWS, TALES))
    assert laws.norm().item() == pytest.approx(1.0)
    torch.testing.assert_close(embed(model, [LAWS, LAWS]), laws)
    light = dataclasses.replace(TALES, weight=0.5)
    torch.testing.assert_close(embed(model, [LAWS, light]), (laws + 0.5 * tales) / 1.5)


def test_what_was_taught_helps_on_its_text_and_another_goal_helps_less():
    model = build_base("mixtral")
    teach(model, 120)
    made = model.steering.conditioning

    def loss(goal, tokens):
        with torch.no_grad(), conditioned(made, None if goal is None else embed(model, [goal])):
            return float(model(tokens, labels=tokens, use_cache=False).loss)

    for mine, other, text in ((LAWS, TALES, rows(0, 12, 32, 999)), (TALES, LAWS, rows(40, VOCAB, 32, 999))):
        assert loss(mine, text) < loss(None, text) - 0.005
        assert loss(mine, text) < loss(other, text) - 0.005


def test_the_anchor_keeps_other_text_as_it_is():
    changed = []
    for anchored in (True, False):
        model = build_base("mixtral")
        teach(model, 60, anchored)
        other = rows(12, 40, 16, 77)
        before = logits(model, other)
        condition(model, [LAWS])
        changed.append((logits(model, other) - before).abs().mean())
    assert changed[0] < changed[1]


def test_it_is_saved_beside_the_weights_it_was_learned_with_and_no_others(tmp_path):
    model = build_base("mixtral")
    assert not load_conditioning(model, tmp_path)
    teach(model, 4)
    save_conditioning(model, tmp_path)
    tokens = rows(0, VOCAB)
    condition(model, [LAWS])
    taught = logits(model, tokens)
    again = build_base("mixtral")
    assert load_conditioning(again, tmp_path)
    condition(again, [LAWS])
    assert torch.equal(logits(again, tokens), taught)
    with torch.no_grad():
        again.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="other weights"):
        load_conditioning(again, tmp_path)
    data = (tmp_path / FILE).read_bytes()
    for damaged in (data[:40], b"", data[:8] + b"x" + data[9:]):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="teach"):
            load_conditioning(build_base("mixtral"), tmp_path)
    with pytest.raises(ConfigError, match="no routers"):
        attach_conditioning(torch.nn.Linear(2, 2))
