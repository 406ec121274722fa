"""Diagnostics: what the state says of its landscape and of the experts in its valleys."""

import json
import math

import pytest
import torch

from chronomoe import ControlConfig
from chronomoe.control.diagnostics import landscape_of, valley_health_of
from chronomoe.control.landscape import BLOCK
from chronomoe.control.state import ControlState
from chronomoe.control.tick import move_temperature
from chronomoe.errors import ConfigError
from chronomoe.knob import KnobFactors
from tests.chronomoe.control.building import build, train


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


@pytest.mark.parametrize("steady", [True, False])
def test_a_landscape_has_formed_when_the_same_experts_stay_hot_and_not_when_they_change(steady):
    state, config, generator = ControlState(1, 8, 4), ControlConfig(), torch.Generator().manual_seed(0)
    error = torch.rand(1, 8, generator=generator)
    for now in range(1, 20 * BLOCK + 1):
        state.ticks += 1
        if not steady and (now - 1) % BLOCK == 0:
            error = torch.rand(1, 8, generator=generator)
        move_temperature(state, error, config, KnobFactors(), now)
    for layer in (0, -1, None):
        assert landscape_of(state, config, layer)["landscape_formed"] is steady


def test_valleys_of_all_layers_are_named_by_layer():
    state, config = ControlState(2, 6, 4), ControlConfig()
    state.structural_T_local[:] = torch.tensor([0.0, -0.4, 0.009, 0.005, 0.4, -0.009])
    state.health[0, 1], state.health[1, 1] = 0.5, -0.5
    found = valley_health_of(state, config)
    assert found["healthy_valleys"] == ["0.1"]
    assert found["unhealthy_valleys"] == ["1.1"]
    assert found["mean_valley_health"] == 0
    assert not found["self_correction_working"]
