"""The controller: nested in what it generalises, still where it must not move, unharmed by broken steps."""

import dataclasses
import math

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import chronomoe
from chronomoe import ControlConfig
from chronomoe.control.config import ABLATIONS
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.errors import ConfigError
from chronomoe.training import ChronoMoELoss
from tests.chronomoe.conftest import FAMILIES, build_host
from tests.chronomoe.control.building import batches, build, same_weights, train
from tests.chronomoe.everything import differing, everything


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
    before = everything(model)
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    assert controller.tick(finite=False) is None
    assert controller.tick() is None, "zero tokens"
    assert before["controller.live_pressure"].any()
    assert before["steering.load"].std() > 0
    assert not differing(before, everything(model))
    assert len(controller.coherence_history) == 5


def test_evaluation_and_generation_never_move_it():
    model = build()
    train(model, 5)
    before = everything(model)
    model.eval()
    model(input_ids=batches(1)[0], labels=batches(1)[0])
    model.generate(batches(1)[0][:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not differing(before, everything(model))


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


def test_a_broken_expert_is_masked_by_the_tick():
    model = build()
    train(model, 5)
    controller, x = model.controller, batches(1)[0]
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0] = math.nan
    model(input_ids=x, labels=x).loss.backward()
    with pytest.warns(UserWarning, match="expert 0 of layer 1 is masked"):
        assert controller.tick() is None
    assert model(input_ids=x, labels=x).loss.isfinite()


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


def test_reset_is_as_new():
    model, new = build(), build()
    model.controller.set_knob(0.7)
    train(model, 5)
    assert differing(everything(new.controller), everything(model.controller))
    model.controller.reset()
    assert not differing(everything(new.controller), everything(model.controller))
    assert not differing(everything(new.steering), everything(model.steering))
    assert model.controller.meta_knob.kappa == 0
    assert not model.controller.coherence_history
