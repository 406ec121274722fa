"""The controller: nested in what it generalises, still where it must not move, the same under renumbering."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import chronomoe
from chronomoe import ChronovisorMixtralForCausalLM, ControlConfig, MixtralConfig
from chronomoe.control.config import ABLATIONS
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.control.judge import set_masked
from chronomoe.errors import ConfigError
from chronomoe.training import ChronoMoELoss
from tests.chronomoe.conftest import FAMILIES, build_host
from tests.chronomoe.everything import differing, everything

VOCAB = 61


def build(control=None, seed=0, **shape):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "hidden_dim": 32, "num_layers": 2, "num_experts": 6, "max_seq_length": 64} | shape
    model = ChronovisorMixtralForCausalLM(MixtralConfig(**shape)).train()
    model.controller.config = control or ControlConfig()
    return model


def batches(n=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (n, 4, 16), generator=generator)


def train(model, steps=50, after=None, data=batches):
    """Steps as a bare loop takes them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for x in data(steps):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        window = model.controller.tick()
        if after is not None:
            after(window)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class LossFreeRouter(MixtralTopKRouter):
    """Wang et al. 2024, algorithm 1, as its authors write it: the bias chooses, the gate does not know it."""

    def forward(self, hidden_states):
        h = hidden_states.reshape(-1, self.hidden_dim)
        logits = torch.nn.functional.linear(h.float(), self.weight.float())
        chosen = (logits + self.bias).topk(self.top_k, dim=-1).indices
        self.counts = torch.bincount(chosen.flatten(), minlength=self.num_experts).float()
        weights = logits.softmax(dim=-1).gather(-1, chosen)
        return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


def plain_twin(steered):
    """transformers' own model with the same weights and dispatch, and nothing of ours."""
    config = transformers.MixtralConfig(
        **{
            name: value
            for name, value in steered.config.to_dict().items()
            if name in transformers.MixtralConfig().to_dict()
        }
    )
    plain = transformers.MixtralForCausalLM(config)
    plain.load_state_dict(steered.state_dict(), strict=False)
    plain.set_experts_implementation("sorted")
    return plain.train()


def train_plain(model, after=lambda: None):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for x in batches(50):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        after()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


NO_LOSS = ChronoMoELoss(lambda_balance=0, lambda_coherence=0, lambda_valley=0, lambda_z=0)


def test_all_gains_zero_is_transformers_own_model_bit_for_bit():
    zero = ControlConfig(
        gamma=0, gamma_p=0, gamma_early=0, gamma_alarm=0, beta_usage=0, beta_recovery=0, beta_specialist=0,
        initial_noise=0, health=False,
    )  # fmt: skip
    steered = build(zero)
    steered.steering.config = dataclasses.replace(steered.steering.config, loss=NO_LOSS)
    plain = plain_twin(steered)
    assert train(steered) == train_plain(plain)
    assert all(torch.equal(p, steered.get_parameter(name)) for name, p in plain.named_parameters())


def test_the_sign_rule_is_loss_free_balancing_of_transformers_own_model_bit_for_bit():
    steered = build(ControlConfig(sign_step=0.01, centred=False).ablate("loss_free"))
    steered.steering.config = dataclasses.replace(steered.steering.config, loss=NO_LOSS)
    plain = plain_twin(steered)
    routers = [layer.mlp.gate for layer in plain.model.layers]
    for router in routers:
        router.__class__, router.bias = LossFreeRouter, torch.zeros(6)

    def update():
        for router in routers:
            router.bias = router.bias + 0.01 * torch.sign(router.counts.mean() - router.counts)

    assert train(steered) == train_plain(plain, update)
    assert torch.equal(steered.controller.live_pressure, torch.stack([router.bias for router in routers]))
    assert steered.controller.live_pressure.abs().max() > 0.02


def test_all_gains_zero_is_the_plain_router_bit_for_bit():
    zero = ControlConfig(
        gamma=0, gamma_p=0, gamma_early=0, gamma_alarm=0, beta_usage=0, beta_recovery=0, beta_specialist=0,
        initial_noise=0, health=False,
    )  # fmt: skip
    steered, plain = build(zero), build(ControlConfig().ablate("none"))
    for model in (steered, plain):
        model.steering.config = dataclasses.replace(model.steering.config, loss=ChronoMoELoss(lambda_coherence=0))
    assert train(steered) == train(plain)
    assert same_weights(steered, plain)


def test_the_sign_rule_is_loss_free_balancing_bit_for_bit():
    control = dataclasses.replace(ControlConfig(sign_step=0.01, centred=False), **ABLATIONS["loss_free"])
    ours, theirs = build(control), build(ControlConfig().ablate("none"))
    bias = torch.zeros(2, 6)

    def loss_free(window):
        # Wang et al. 2024, algorithm 1, written independently: b_i += u sign(mean(c) - c_i).
        counts = window.assignments
        bias.add_(0.01 * torch.sign(counts.mean(dim=-1, keepdim=True) - counts))
        theirs.steering.pressure.copy_(bias)

    assert train(ours) == train(theirs, after=loss_free)
    assert same_weights(ours, theirs)
    assert torch.equal(ours.controller.live_pressure, bias)
    assert bias.abs().max() > 0.02


def test_a_step_that_is_not_finite_or_empty_moves_nothing():
    model = build()
    train(model, 5)
    controller = model.controller
    before, fields = everything(controller), everything(model.steering)
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    assert controller.tick(finite=False) is None
    assert controller.tick() is None, "zero tokens"
    assert not differing(before, everything(controller))
    assert not differing(fields, everything(model.steering))
    assert len(controller.coherence_history) == 5


def test_evaluation_and_generation_never_move_it():
    model = build()
    train(model, 5)
    before = everything(model)
    model.eval()
    model(input_ids=batches(1)[0], labels=batches(1)[0])
    model.generate(batches(1)[0][:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not differing(before, everything(model))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (2, 1)])
def test_degenerate_layers_stay_finite(experts, top_k):
    model = build(num_experts=experts, num_experts_per_token=top_k)
    assert all(math.isfinite(loss) for loss in train(model, 10))
    assert all(value.isfinite().all() for value in model.controller.buffers())
    diagnostics = model.controller.get_diagnostics()
    assert math.isfinite(diagnostics["kuramoto_R"])


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
            controller.steering.end_step = lambda given_window=given_window: given_window
            controller.tick()
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
            controller.steering.end_step = lambda window=window: window
            controller.tick()
    more = windows[2].assignments.clone()
    more[:, 2] += 20
    changed = dataclasses.replace(windows[2], assignments=more)
    for controller, window in ((base, windows[2]), (loaded, changed)):
        controller.steering.end_step = lambda window=window: window
        controller.tick()
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
        controller.steering.end_step = lambda window=window: window
        controller.tick()
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
        controller.steering.end_step = lambda window=window: window
        controller.tick()
        average += max(0.1, 1 / step) * (controller.live_pressure - average)
    torch.testing.assert_close(controller.mean_pressure, average)


def test_numbers_that_are_not_finite_do_not_get_in():
    model = build()
    train(model, 5)
    controller, x = model.controller, batches(1)[0]
    before = everything(controller)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0] = math.nan
    model(input_ids=x, labels=x).loss.backward()
    controller.config = dataclasses.replace(controller.config, health=False)
    assert controller.tick() is None, "without the caller saying that the step was not finite"
    assert not differing(before, everything(controller))


def test_a_broken_expert_is_masked_without_anybody_asking():
    model = build()
    train(model, 5)
    controller, x = model.controller, batches(1)[0]
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0] = math.nan
    model(input_ids=x, labels=x).loss.backward()
    with pytest.warns(UserWarning, match="expert 0 of layer 1 is masked"):
        assert controller.tick() is None
    assert model(input_ids=x, labels=x).loss.isfinite()


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


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4)])
def test_where_every_token_uses_every_expert_routing_is_coherent(experts, top_k):
    model = build(num_experts=experts, num_experts_per_token=top_k)
    train(model, 3)
    assert pytest.approx(1) == model.controller.R


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


def test_one_steering_has_one_controller():
    model = build()
    with pytest.raises(ConfigError, match="has a controller already"):
        ChronovisorMixtralController(model.steering)


def test_deployment_uses_the_averaged_pressure_and_puts_the_live_one_back():
    model = build()
    controller = model.controller
    controller.set_knob(1.0)
    train(model, 20)
    live = model.steering.pressure.clone()
    with controller.deployed():
        assert torch.equal(model.steering.pressure, controller.mean_pressure)
        assert model.steering.exploration == 0
    assert torch.equal(model.steering.pressure, live)
    assert not torch.equal(live, controller.mean_pressure)
    assert model.steering.exploration > 0


def test_pressure_balances_where_nothing_else_does():
    free, held = build(ControlConfig().ablate("none"), seed=3), build(seed=3)
    for model in (free, held):
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[0] *= 8  # one loud expert
        model.steering.config = dataclasses.replace(model.steering.config, loss=ChronoMoELoss(lambda_balance=0))
        train(model, 40)
    violation = [(m.controller.mean_load.amax(-1) * 6 - 1).max().item() for m in (free, held)]
    assert violation[1] < 0.5 * violation[0]


def test_it_works_on_every_attached_model():
    for family in FAMILIES:
        model = build_host(family).train()
        controller = chronomoe.attach(model)
        assert controller is model.controller
        for x in batches(3):
            model(input_ids=x, labels=x).loss.backward()
            controller.tick()
        assert int(controller.ticks) == 3
        assert model.steering.pressure.abs().max() > 0


def test_ablations_are_configurations():
    for name in ABLATIONS:
        config = ControlConfig().ablate(name)
        model = build(config)
        train(model, 3)
        assert bool(model.steering.pressure.any()) is (config.pressure != "off")
        assert bool(model.steering.log_temperature.any()) is config.temperature
    with pytest.raises(ConfigError, match="there is no control setting 'magic'"):
        ControlConfig().ablate("magic")


@pytest.mark.parametrize(
    "settings",
    [{"pressure": "hard"}, {"gamma": -1}, {"gamma": math.nan}, {"leak": 2}, {"coherence_memory": 1.0}, {"bound": 0},
     {"probe_every": 0}, {"health_scale": 0}, {"bound": math.inf}, {"gamma": "0.1"}, {"temperature": "false"},
     {"probe_sequences": 2.5}],
)  # fmt: skip
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ControlConfig(**settings)


def test_it_moves_and_is_copied_with_its_model():
    model = build()
    train(model, 3)
    other = copy.deepcopy(model)
    assert other.controller.steering is other.steering
    train(other, 2)
    assert int(model.controller.ticks) == 3
    assert int(other.controller.ticks) == 5
    lower = other.to(torch.bfloat16).controller
    assert lower.live_pressure.dtype == torch.float32
    assert lower.ticks.dtype == torch.int64


def test_reset_is_as_new():
    model, new = build(), build()
    model.controller.set_knob(0.7)
    train(model, 5)
    model.controller.reset()
    assert not differing(everything(new.controller), everything(model.controller))
    assert not differing(everything(new.steering), everything(model.steering))
    assert model.controller.meta_knob.kappa == 0
    assert not model.controller.coherence_history


def test_diagnostics_of_a_landscape_and_its_valleys():
    model = build()
    train(model, 3)
    controller = model.controller
    controller.structural_T_local[1] = torch.tensor([0.0, -0.4, 0.009, 0.005, 0.4, -0.009])
    controller.health[1] = torch.tensor([0.0, -0.9, 0, 0, 0, 0])
    found = controller.get_structural_temperature_diagnostics(1)
    assert (found["label"], found["valleys"], found["ridges"]) == ("layer_1", [1], [4])
    assert found["landscape_formed"] is False, "three ticks form nothing"
    assert found["structural_T"][1] == pytest.approx(math.exp(-0.4), rel=1e-5)
    valleys = controller.get_valley_health_diagnostics(1)
    assert valleys["unhealthy_valleys"] == ["1.1"]
    assert not valleys["self_correction_working"]
    assert controller.get_structural_temperature_diagnostics()["label"] == "global"
    json.dumps(controller.get_diagnostics(), allow_nan=False)
    assert controller.valley_weight[1, 1] > 0.5
    assert torch.count_nonzero(controller.valley_weight) == 1
    with pytest.raises(ConfigError, match="no MoE layer 2"):
        controller.get_structural_temperature_diagnostics(2)


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


def test_an_expert_let_in_again_cools_down_and_can_be_judged_anew():
    model = build(ControlConfig(probe_every=1, suspect_below=1.0))
    controller = model.controller
    controller.recovering[0, 1] = 1.0
    controller.ticks.fill_(10)
    controller.health.fill_(-1)
    assert (0, 1) not in controller.suspects()
    assert (0, 2) in controller.suspects()
    train(model, steps=1)
    assert controller.recovering[0, 1] == pytest.approx(0.98)
    train(model, steps=40)
    assert controller.recovering[0, 1] < 0.5
    controller.health[0, 1] = -1.0
    assert (0, 1) in controller.suspects()


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
