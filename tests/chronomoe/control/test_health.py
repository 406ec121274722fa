"""Health: odd, bounded, free of scale; the gradient sees an expert that harms."""

import torch

from chronomoe.control.health import health, update_signal
from tests.chronomoe.control.building import text


def test_health_is_odd_bounded_and_free_of_scale():
    contrast, size = torch.tensor([[0.3, -0.3, 0.0]]), torch.tensor([1.0])
    r = health(contrast, size, 0.25)
    assert r[0, 0] == -r[0, 1]
    assert r[0, 2] == 0
    torch.testing.assert_close(health(contrast * 1e-4, size * 1e-4, 0.25), r)


def test_the_gradient_sees_an_expert_that_harms(model):
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[3] *= -4
    for x in text(20, seed=5):
        model(input_ids=x, labels=x).loss.backward()
        model.zero_grad()
        model.controller.tick()
    r = model.controller.health[0]
    assert r.argmin() == 3
    assert r[3] < -0.3
    assert (0, 3) in model.controller.suspects()


def test_an_expert_without_tokens_keeps_its_signal_and_a_layer_too():
    contrast, size = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([1.0, 1.0])
    gradient, count = torch.tensor([[-8.0, 0.0], [0.0, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    update_signal(contrast, size, gradient, gradient.abs(), count)
    torch.testing.assert_close(contrast, torch.tensor([[0.98 * 0.5 + 0.02 * 2, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(size, torch.tensor([0.98 + 0.02 * 2, 1.0]))
