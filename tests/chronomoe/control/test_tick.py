"""One tick: what a window moves, what it may not, and how kappa scales it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from chronomoe import ControlConfig
from chronomoe.control.judge import set_masked
from chronomoe.errors import ConfigError
from tests.chronomoe.control.building import batches, build, feed, train


def test_conservation_laws_hold_after_every_tick():
    model = build()

    def check(window):
        assert model.steering.pressure.sum(-1).abs().max() < 1e-5
        assert model.steering.log_temperature.sum(-1).abs().max() < 1e-5
        bound = model.controller.config.bound * model.controller.spread.clamp(min=0.01).unsqueeze(-1)
        assert torch.all(model.steering.pressure.abs() <= bound)

    train(model, 30, check)
    assert model.steering.pressure.abs().max() > 0
    assert model.steering.log_temperature.abs().max() > 0


@settings(max_examples=10)
@given(st.permutations(range(6)))
def test_renumbering_the_experts_renumbers_the_state(order):
    """The tick is a function of the window: feed it a renumbered one."""
    order = list(order)
    source = build()
    windows = []
    train(source, 6, windows.append)
    mine, theirs = build().controller, build().controller
    for window in windows:
        renumbered = dataclasses.replace(
            window,
            **{
                name: getattr(window, name)[:, order]
                for name in ("assignments", "probability", "weight", "gradient", "absolute_gradient", "inputs")
            },
            coactivation=window.coactivation[:, order][:, :, order],
        )
        for controller, given_window in ((mine, window), (theirs, renumbered)):
            feed(controller, given_window)
    for name in ("live_pressure", "structural_T_local", "temperature_fast", "health", "coherence", "mean_load"):
        torch.testing.assert_close(
            getattr(mine, name)[:, order],
            getattr(theirs, name),
            atol=1e-5,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_more_load_never_raises_an_experts_score_at_the_next_tick():
    source = build()
    windows = []
    train(source, 3, windows.append)
    base, loaded = build().controller, build().controller
    for window in windows[:2]:
        for controller in (base, loaded):
            feed(controller, window)
    more = windows[2].assignments.clone()
    more[:, 2] += 20
    changed = dataclasses.replace(windows[2], assignments=more)
    for controller, window in ((base, windows[2]), (loaded, changed)):
        feed(controller, window)
    assert torch.all(loaded.live_pressure[:, 2] < base.live_pressure[:, 2])
    assert torch.all(loaded.temperature_fast[:, 2] <= base.temperature_fast[:, 2])


def test_kappa_scales_temperature_noise_and_gain():
    model = build()
    controller = model.controller
    controller.set_knob(0.5, "explore")
    train(model, 2)
    assert model.steering.base_temperature.item() == pytest.approx(math.exp(0.2))
    assert model.steering.exploration.item() == pytest.approx(0.3 * 0.5 * controller.spread.mean().item(), rel=1e-5)
    controller.set_knob(-0.5)
    train(model, 1)
    assert model.steering.exploration.item() == 0
    with pytest.raises(ConfigError, match="kappa"):
        controller.set_knob(2)
    assert controller.meta_knob.kappa == -0.5


def ticked(kappa=0.0, control=None, n=3):
    """A controller that has seen the same few windows under that kappa."""
    source, windows = build(), []
    train(source, n, windows.append)
    controller = build(control).controller
    controller.set_knob(kappa)
    for window in windows:
        feed(controller, window)
    return controller


def test_kappa_scales_the_gain_of_the_pressure_and_the_rates():
    calm, eager = ticked(-1.0, n=1), ticked(1.0, n=1)
    ratio = eager.live_pressure / calm.live_pressure
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.e), rtol=1e-3, atol=0)
    ratio = eager.structural_T_local / calm.structural_T_local
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(1.4)), rtol=1e-3, atol=0)
    sign = [ticked(kappa, ControlConfig().ablate("loss_free"), 1).live_pressure.abs().max() for kappa in (-1.0, 1.0)]
    assert (sign[1] / sign[0]).item() == pytest.approx(math.e, rel=1e-4)


def test_the_deployed_pressure_is_the_average_its_rate_says():
    source, windows = build(), []
    train(source, 14, windows.append)
    controller, average = build().controller, torch.zeros(2, 6)
    for step, window in enumerate(windows, 1):
        feed(controller, window)
        average += max(0.1, 1 / step) * (controller.live_pressure - average)
    torch.testing.assert_close(controller.mean_pressure, average)


def test_the_integral_gain_is_high_at_the_start_and_falls():
    """Calm settings but for the early gain: what the same error moves at the first tick, and much later."""
    moved = {}
    for early in (0.3, 0.07):
        model = build(ControlConfig(gamma_early=early, gamma_p=0.0, alarm=1e9, early_ticks=3.0, temperature=False))
        model.controller.set_knob(0.0)
        train(model, steps=1)
        first = model.controller.live_pressure.abs().sum()
        model.controller.ticks.fill_(99)
        before = model.controller.live_pressure.clone()
        train(model, steps=1, data=lambda n: batches(n, seed=2))
        moved[early] = first, (model.controller.live_pressure - before).abs().sum()
    assert moved[0.3][0] / moved[0.07][0] == pytest.approx(0.3 / 0.07, rel=1e-3)
    assert 0.5 < moved[0.3][1] / moved[0.07][1] < 2  # the loads they start from differ by now


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4)])
def test_where_every_token_uses_every_expert_routing_is_coherent(experts, top_k):
    model = build(num_experts=experts, num_experts_per_token=top_k)
    train(model, 3)
    assert pytest.approx(1) == model.controller.R


def test_each_structural_temperature_has_a_rate_of_its_own():
    model = build(ControlConfig(eta_structural_T_local=0.5, eta_structural_T_global=0.125))
    controller = model.controller
    controller.set_knob(0.0)
    train(model, steps=1)
    fast = controller.temperature_fast
    assert fast.abs().max() > 0
    torch.testing.assert_close(controller.structural_T_local, 0.5 * fast)
    torch.testing.assert_close(controller.structural_T_global, 0.125 * fast.mean(dim=0))


def test_fast_and_structural_temperature_are_weighed():
    model = build()
    controller = model.controller
    train(model, steps=5)
    seen = []
    for weight in (1.0, 0.0):
        controller.config = dataclasses.replace(controller.config, fast_weight=weight)
        seen.append(controller.temperature_effective)
    controller.config = dataclasses.replace(controller.config, fast_weight=0.25)
    mixed = controller.temperature_effective
    assert not torch.allclose(*seen)
    between = (mixed - seen[1]) / (seen[0] - seen[1])
    clear = (seen[0] - seen[1]).abs() > 1e-4
    assert clear.any()
    assert (between[clear] > 0).all()
    assert (between[clear] < 1).all()


def test_routers_know_the_mean_of_their_inputs():
    model = build()
    seen = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    train(model, steps=1)
    mean = seen[0].detach().reshape(-1, seen[0].shape[-1]).mean(dim=0)
    torch.testing.assert_close(model.controller.steering.input_mean[0], mean, rtol=1e-4, atol=1e-5)


def two_domains(n, seed):
    """Text (n, 8, 32) of two domains, each with words of its own, of which three may follow each word."""
    generator = torch.Generator().manual_seed(seed)
    follow = torch.randint(0, 30, (2, 30, 3), generator=torch.Generator().manual_seed(7))
    text = torch.zeros(n, 8, 32, dtype=torch.long)
    for row in range(8):
        word = torch.randint(0, 30, (n,), generator=generator)
        for place in range(32):
            text[:, row, place] = word + 30 * (row % 2)
            word = follow[row % 2, word, torch.randint(0, 3, (n,), generator=generator)]
    return text


def test_coherence_is_high_on_a_trained_router_and_nothing_on_random_choices():
    model = build()
    train(model, steps=60, data=lambda n: two_domains(n, seed=1))
    controller = model.controller
    found = {}
    for noise in (0.0, 1e4):
        controller.forget()
        controller.config = controller.config.ablate("none")
        controller.steering.pressure.zero_()
        controller.steering.exploration.fill_(noise)
        with torch.no_grad():
            for x in two_domains(150, seed=99):
                model(input_ids=x)
                controller.tick()
        found[noise] = controller.R
    assert found[0.0] > 0.92
    assert found[1e4] < 0.06


def test_a_mechanism_switched_off_leaves_nothing_behind():
    model = build()
    model.controller.set_knob(1.0)
    train(model, 10)
    set_masked(model.controller, model.controller.steering, 0, 3, masked=True)
    model.controller.config = model.controller.config.ablate("none")
    model.controller.release()
    model.steering.refresh()
    assert model.steering.neutral
    assert all(model.steering.all_available)
    assert not model.steering.exploring


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_tick_costs_the_same_however_long_the_run():
    source, windows = build(), []
    train(source, 1, windows.append)
    controller, costs = build().controller, {}
    controller.steering.end_step = lambda: windows[0]
    for tick in range(1, 2001):
        if tick in (30, 1990):  # of the same place in a block
            with Operations() as operations:
                controller.tick()
            costs[tick] = operations.count
        else:
            controller.tick()
    assert costs[30] == costs[1990] > 50
    state = sum(buffer.numel() for buffer in controller.buffers())
    assert state == sum(buffer.numel() for buffer in build().controller.buffers())
    assert len(controller.coherence_history) <= 1000
