"""Training under a goal: pressure and the balance loss leave alone what the goal asked for."""

import dataclasses

import pytest
import torch

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.goals.settings import GoalSettings
from chronomoe.goals.steer import Goal, turn_on
from chronomoe.routing.statistics import RoutingWindow

VOCAB = 61


def build(**steering):
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_dim": 32, "num_layers": 2, "num_experts": 6, "max_seq_length": 64}
    model = ChronovisorMixtralForCausalLM(MixtralConfig(**shape)).train()
    model.steering.config = dataclasses.replace(model.steering.config, **steering)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(8)  # logits as of a trained router: a goal shifts, it does not decide
    return model


def train(model, steps=150):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    windows = []
    for _ in range(steps):
        x = torch.randint(0, VOCAB, (4, 32), generator=generator)
        model(input_ids=x, labels=x).loss.backward()
        windows.append(model.controller.tick())
        optimizer.step()
        optimizer.zero_grad()
    return windows[-40:]


def mean(windows, name):
    return torch.stack([getattr(window, name) for window in windows]).mean(dim=0)


def test_pressure_does_not_cancel_a_goal(monkeypatch):
    model = build()
    turn_on(model, [Goal(text="x", slots=((None, 2),))], GoalSettings(beta=0.6))
    windows = train(model)
    share, unasked = mean(windows, "load"), mean(windows, "load_without_goals")
    assert (share[:, 2] > 1.25 / 6).all()  # the goal's share stays
    assert (unasked * 6 - 1).abs().max() < 0.1  # and what it does not ask for is balanced
    # With a controller that counts what goals moved, it would be gone: the test sees the difference.
    monkeypatch.setattr(RoutingWindow, "load_without_goals", RoutingWindow.load)
    fought = build()
    turn_on(fought, [Goal(text="x", slots=((None, 2),))], GoalSettings(beta=0.6))
    assert (mean(train(fought), "load")[:, 2] < 1.1 / 6).all()


@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_what_goals_moved_is_the_difference_of_two_choices(masked, capacity):
    model = build(capacity_factor=capacity)
    x = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(x)
    if masked:
        mask[0, 12:] = 0

    def counts():
        model(input_ids=x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss.backward()
        window = model.steering.statistics.window()
        model.steering.discard_step()
        return window

    plain = counts()
    assert not plain.goal_shift.any()
    turn_on(model, [Goal(text="x", slots=((0, 2),))], GoalSettings(beta=1.0))
    model.train()
    asked = counts()
    # The first layer sees the same inputs with and without.
    torch.testing.assert_close(asked.goal_shift[0], asked.assignments[0] - plain.assignments[0])
    assert (asked.goal_shift[0, 2] > 0) == (capacity is None)  # a full expert takes no more
    assert asked.goal_shift[0].any()
    torch.testing.assert_close(asked.load_without_goals[0], plain.load[0])
    assert not asked.goal_shift[1].any()


def test_noise_is_the_same_with_and_without_a_goal():
    model = build()
    model.steering.exploration.fill_(0.5)
    x = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(2))

    def counts():
        torch.manual_seed(5)
        model(input_ids=x, labels=x).loss.backward()
        window = model.steering.statistics.window()
        model.steering.discard_step()
        return window

    plain = counts()
    turn_on(model, [Goal(text="x", slots=((0, 2),))], GoalSettings(beta=1.0))
    model.train()
    asked = counts()
    assert asked.load[0, 2] > plain.load[0, 2]
    torch.testing.assert_close(asked.load_without_goals[0], plain.load[0])


def test_the_balance_loss_counts_what_was_not_asked_for():
    model = build()
    x = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(2))
    assigned = {}
    losses = model.steering.layer_losses

    def looked(context, share=None):
        assigned.update(zip(context.sums.layers, context.sums.assigned, strict=True))
        return losses(context, share)

    model.steering.layer_losses = looked
    model(input_ids=x, labels=x)
    before = assigned[0].clone()
    turn_on(model, [Goal(text="x", slots=((0, 2),))], GoalSettings(beta=1.0))
    model.train()
    model(input_ids=x, labels=x)
    assert torch.equal(assigned[0], before)
