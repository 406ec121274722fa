"""Pressure: exact projection, the loop settles, the sign rule is loss-free balancing."""

import statistics

import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.control.pressure import equal_target, pi_update, project
from chronomoe.routing.state import SteeringConfig
from chronomoe.routing.steering import Steering
from tests.chronomoe.draws import many, one_call


@st.composite
def rows(draw):
    n, layers = draw(st.integers(1, 12)), draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    b = torch.randn(layers, n, generator=generator) * draw(st.floats(0.01, 20))
    bound = torch.rand(layers, 1, generator=generator) * draw(st.floats(0.01, 10)) + 1e-3
    return b, bound


@many
@given(rows())
def test_the_projection_is_feasible_and_nearest(draw):
    b, bound = draw
    got = project(b, bound)
    scale = b.abs().amax(-1) + bound[:, 0]
    assert torch.all(got.sum(-1).abs() <= 1e-5 * scale * b.shape[-1] + 1e-6)
    assert torch.all(got.abs() <= bound)
    # Nearest: got = clip(b - mu, bound) for one mu, so b - got is mu wherever the bound does not act.
    inside = got.abs() < bound * (1 - 1e-5)
    mu = torch.where(inside, b - got, torch.nan)
    spread = torch.nan_to_num(mu, nan=-torch.inf).amax(-1) - torch.nan_to_num(mu, nan=torch.inf).amin(-1)
    assert torch.all((spread <= 1e-4 * scale) | (inside.sum(-1) == 0))
    for low, b_row, got_row, limit in zip(inside, b, got, bound, strict=True):
        if low.any():
            shift = (b_row - got_row)[low].mean()
            torch.testing.assert_close(got_row, (b_row - shift).clamp(-limit, limit), atol=1e-4, rtol=1e-3)


@many
@given(rows())
def test_projecting_twice_changes_nothing_and_order_is_kept(draw):
    b, bound = draw
    once = project(b, bound)
    torch.testing.assert_close(project(once, bound), once, atol=1e-5, rtol=1e-5)
    order = b.argsort(dim=-1)
    assert torch.all(once.gather(-1, order).diff(dim=-1) >= -1e-6)


@many
@given(rows(), st.randoms())
def test_the_projection_knows_no_numbering(draw, random):
    b, bound = draw
    order = torch.tensor(random.sample(range(b.shape[-1]), b.shape[-1]))
    torch.testing.assert_close(project(b, bound)[:, order], project(b[:, order], bound), atol=1e-5, rtol=1e-5)


def test_targets_are_equal_shares_of_the_available():
    available = torch.tensor([[True, True, False, True], [True, True, True, True]])
    third = 1 / 3
    torch.testing.assert_close(equal_target(available), torch.tensor([[third, third, 0, third], [0.25] * 4]))


def test_the_integral_does_not_wind_up():
    gamma, bound = torch.full((1, 1), 0.1), torch.full((1, 1), 1.0)
    integral = torch.zeros(1, 4)
    error = torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]])  # one expert that never gets tokens
    for _ in range(2000):
        integral, b = pi_update(integral, error, error, gamma, gamma, bound)
    assert b.abs().max() <= 1
    assert integral.abs().max() <= 1 + 0.1 / 0.5 + 0.1 + 1e-5, "B + (gamma / anti-windup) |e| + gamma_P |e|"


def test_a_leak_forgets():
    integral, zero = torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2)
    integral, _ = pi_update(integral, zero, zero, zero[:, :1], zero[:, :1], None, leak=0.25)
    assert integral.tolist() == [[0.75, -0.75]]


class Plant:
    """Logits of unit spread, offsets of spread 0.5 that shift by as much; the load is what top-2 of 8 makes of it."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.offsets = torch.zeros(8)
        self.shift()

    def shift(self):
        self.offsets = self.offsets + torch.randn(8, generator=self.generator) * 0.5

    def logits(self):
        return torch.randn(1024, 8, generator=self.generator) + self.offsets


def steps_to_settle(control, seed, shift_at=300, length=420):
    """Ticks of a real controller until the load has settled after a shift; None if it does not."""
    controller = ChronovisorMixtralController(Steering(1, 8, 2, 4, SteeringConfig()), control)
    steering, plant, recent = controller.steering, Plant(seed), []
    for step in range(length):
        if step == shift_at:
            plant.shift()
            recent = []
        z = plant.logits()
        p = z.softmax(dim=-1)
        chosen = (steering.scores(0, z)).topk(2).indices
        steering.statistics.record(*one_call(0, torch.zeros(len(z), 4), z, p, chosen, p.gather(1, chosen)))
        window = controller.tick()
        recent = [*recent[-9:], window.load[0]]
        if step >= shift_at and (torch.stack(recent).mean(0).max() * 8 - 1).item() < 0.15:
            return step - shift_at + 1
    return None


def test_pi_settles_within_15_steps_of_a_shift_the_sign_rule_within_90_and_no_control_never():
    pi, sign, none = (
        [steps_to_settle(control, seed) for seed in range(6)]
        for control in (
            ControlConfig().ablate("pi"), ControlConfig(sign_step=0.01).ablate("loss_free"),
            ControlConfig().ablate("none"),
        )
    )  # fmt: skip
    assert statistics.median(pi) <= 15, pi
    assert statistics.median(sign) <= 90, sign
    assert none == [None] * 6
