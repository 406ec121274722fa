"""The gate scales the update, not the gradient; the wrapper is a whole optimizer."""

import copy

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.errors import ConfigError
from chronomoe.training import CoherenceGatedOptimizer
from chronomoe.training.gating import gate_value
from tests.chronomoe.draws import many


@pytest.mark.parametrize(
    ("coherence", "gate"),
    [(0.0, 0.5), (0.2, 0.5), (0.32, 0.575), (0.45, 0.65625), (0.6, 0.75), (0.8, 0.875), (1.0, 1.0)],
)
def test_the_table_of_gates(coherence, gate):
    assert gate_value(coherence, 0.2, 0.5) == pytest.approx(gate)


@many
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_gate_is_bounded_and_grows(coherence, minimum, strength):
    gate = gate_value(coherence, minimum, strength)
    assert 1 - strength - 1e-12 <= gate <= 1
    assert gate_value(min(1.0, coherence + 0.1), minimum, strength) >= gate - 1e-12
    assert gate_value(float("nan"), minimum, strength) == pytest.approx(1 - strength)


def model_and_optimizer(**settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3, fused=True), settings


def steps(model, optimizer, n=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("coherence", [0.1, 0.5, 0.9])
def test_the_update_is_adamws_times_the_gate(coherence):
    plain_model, plain, _ = model_and_optimizer()
    steps(plain_model, plain, 3)
    gated_model, inner = copy.deepcopy(plain_model), None
    inner = torch.optim.AdamW(gated_model.parameters(), lr=0.1, weight_decay=0.3, fused=True)
    inner.load_state_dict(copy.deepcopy(plain.state_dict()))
    gated = CoherenceGatedOptimizer(inner, min_coherence=0.2, gating_strength=0.7)
    gated.coherence = coherence
    before = [p.detach().double().clone() for p in plain_model.parameters()]
    steps(plain_model, plain, seed=5)
    steps(gated_model, gated, seed=5)
    for start, full, part in zip(before, plain_model.parameters(), gated_model.parameters(), strict=True):
        torch.testing.assert_close(part.double() - start, gated.gate * (full.double() - start), rtol=1e-5, atol=1e-7)
    assert gated.param_groups[0]["lr"] == 0.1, "the rate is its own again"


def test_a_closed_gate_moves_neither_weights_nor_moments():
    model, inner, _ = model_and_optimizer()
    steps(model, inner, 2)
    gated = CoherenceGatedOptimizer(inner, gating_strength=1.0)
    gated.coherence = 0.1
    weights = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(inner.state_dict()["state"])
    steps(model, gated, 3)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for number, entry in inner.state_dict()["state"].items():
        assert all(torch.equal(entry[name], moments[number][name]) for name in entry)
    # Once it opens again the run goes on from where it was, as if the closed steps had not been.
    twin, plain, _ = model_and_optimizer()
    steps(twin, plain, 2)
    gated.coherence = 1.0
    steps(model, gated, 2, seed=5)
    steps(twin, plain, 2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_open_gate_is_the_wrapped_optimizer():
    model, inner, _ = model_and_optimizer()
    other = copy.deepcopy(model)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.3, fused=True)
    steps(model, CoherenceGatedOptimizer(inner), 4)
    steps(other, plain, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_it_is_a_whole_optimizer():
    model, inner, _ = model_and_optimizer()
    gated = CoherenceGatedOptimizer(inner)
    assert isinstance(gated, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(gated, lambda step: 1 / (1 + step))
    gated.coherence = 0.5
    steps(model, gated, 2)
    schedule.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.05)
    again = CoherenceGatedOptimizer(torch.optim.AdamW(model.parameters(), lr=7.0))
    again.load_state_dict(gated.state_dict())
    assert again.param_groups[0]["lr"] == pytest.approx(0.05)
    assert again.state is again.optimizer.state
    assert len(again.state) == 2
    extra = torch.nn.Parameter(torch.zeros(2))
    gated.add_param_group({"params": [extra]})
    assert len(inner.param_groups) == 2
    assert "CoherenceGatedOptimizer(AdamW" in repr(gated)
    calls = []
    gated.register_step_post_hook(lambda *_: calls.append(1))
    steps(model, gated)
    assert calls == [1]
    assert copy.deepcopy(gated).coherence == 0.5


def test_it_works_under_accelerate():
    model, inner, _ = model_and_optimizer()
    gated = CoherenceGatedOptimizer(inner, gating_strength=1.0)
    accelerator = Accelerator(cpu=True)
    prepared_model, prepared = accelerator.prepare(model, gated)
    before = model.weight.detach().clone()
    gated.coherence = 0.0
    steps(prepared_model, prepared)
    assert torch.equal(model.weight, before)
    gated.coherence = 1.0
    steps(prepared_model, prepared)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("settings", [{"min_coherence": 1.5}, {"gating_strength": -0.1}])
def test_bad_settings_are_named(settings):
    _, inner, _ = model_and_optimizer()
    with pytest.raises(ConfigError, match=next(iter(settings))):
        CoherenceGatedOptimizer(inner, **settings)


def test_a_copy_steps_itself_though_a_scheduler_was_there():
    weight = torch.nn.Parameter(torch.ones(1))
    gated = CoherenceGatedOptimizer(torch.optim.SGD([weight], lr=0.1))
    torch.optim.lr_scheduler.LambdaLR(gated, lambda step: 1.0)
    other = copy.deepcopy(gated)
    for optimizer in (gated, other):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    other.step()
    assert other.param_groups[0]["params"][0].item() == pytest.approx(0.9)
    assert weight.item() == 1
