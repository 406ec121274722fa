"""ControlState: new as documented, fp32 wherever its model goes, of one size however long the run."""

import copy
import math

import pytest
import torch

from chronomoe.control.state import ControlState
from tests.chronomoe.control.building import build, train


def test_a_new_state_has_seen_nothing():
    state = ControlState(3, 4, 5)
    shapes = {name: tuple(buffer.shape) for name, buffer in state.named_buffers()}
    assert shapes["direction"] == (3, 4, 5)
    assert shapes["evidence"] == (3, 3, 4)
    assert shapes["live_pressure"] == shapes["masked"] == shapes["last_probe"] == (3, 4)
    ones = {"forgotten": 1.0, "smooth_load": 0.25, "slow_load": 0.25, "mean_load": 0.25}
    for name, buffer in state.named_buffers():
        assert torch.all(buffer == ones.get(name, 0)), name
    assert state.R == 0


def test_clear_and_make_new_undo_whatever_happened():
    state = ControlState(2, 4, 5)
    new = {name: buffer.clone() for name, buffer in state.named_buffers()}
    for undo in (state.clear, state.make_new):
        for buffer in state.buffers():
            buffer.copy_(torch.ones_like(buffer))
        undo()
        assert all(torch.equal(buffer, new[name]) for name, buffer in state.named_buffers())
        assert not state.state_dict(), "run-time state is saved beside the weights, not among them"


def test_coherence_of_a_layer_is_weighted_by_load_and_of_all_the_mean_of_layers():
    state = ControlState(2, 2, 3)
    state.coherence.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    state.smooth_load.copy_(torch.tensor([[0.75, 0.25], [0.1, 0.9]]))
    assert state.R_per_layer.tolist() == [pytest.approx(0.75), pytest.approx(0.5)]
    assert pytest.approx(0.625) == state.R


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (2, 1)])
def test_degenerate_layers_stay_finite(experts, top_k):
    model = build(num_experts=experts, num_experts_per_token=top_k)
    assert all(math.isfinite(loss) for loss in train(model, 10))
    assert all(value.isfinite().all() for value in model.controller.buffers())
    diagnostics = model.controller.get_diagnostics()
    assert math.isfinite(diagnostics["kuramoto_R"])


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
