"""The arm that lost: a target load that follows health, with the library's own pressure."""

import torch

from chronomoe.control import pressure
from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.routing.state import SteeringConfig
from chronomoe.routing.steering import Steering
from experiments.control_layer import following_health
from tests.chronomoe.draws import one_call


def test_a_health_target_gives_a_healthier_expert_more():
    control = ControlConfig().ablate("pi_health")
    controller = ChronovisorMixtralController(Steering(1, 4, 1, 4, SteeringConfig()), control)
    z = torch.zeros(40, 4)
    even = torch.arange(40).remainder(4).unsqueeze(-1)
    controller.steering.available[0, 3] = False
    controller.health[:, 1], controller.health[:, 2] = 0.9, -0.9
    equal = pressure.equal_target
    with following_health(controller):
        shares = pressure.equal_target(controller.steering.available)
        controller.steering.statistics.record(*one_call(0, z, z, z.softmax(-1), even, torch.ones(40, 1)))
        controller.tick()
    assert pressure.equal_target is equal
    assert shares.sum().item() == torch.tensor(1.0)
    assert shares[0, 1] > shares[0, 0] > shares[0, 2] > 0.02
    assert shares[0, 3] == 0
    bias = controller.live_pressure[0]
    assert bias[1] > bias[0] > bias[2]
