"""The guarantees of the routing map, over random draws (docs/architecture.md, "The routing map")."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.routing.fields import (
    RHO,
    gumbel_like,
    open_probabilities,
    selection_scores,
    temperature,
    within_capacity,
)
from chronomoe.routing.state import SteeringConfig
from chronomoe.routing.steering import Steering
from tests.chronomoe.draws import many

N = 8
ONE = torch.ones(())


def scores(z, bias, tau, base):
    return selection_scores(z, bias, temperature(tau, base))


def raw_scores(z, tau):
    """Logits divided as they are, not their deficits: what the map does not do."""
    return z / temperature(tau, ONE)


def deficit(u):
    return u.amax(dim=-1, keepdim=True) - u


@st.composite
def draws(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (64, N), bias (N,), log-temperature (N,), base temperature; scales vary over orders of magnitude."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.05, 1.0, 20.0]))
    offset = draw(st.sampled_from([0.0, -7.0, 50.0]))
    z = torch.randn(64, N, generator=generator, dtype=torch.float64) * scale + offset
    bias = torch.randn(N, generator=generator, dtype=torch.float64)
    tau = torch.randn(N, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 3.0]))
    return z, bias, tau, torch.tensor(draw(st.floats(0.5, 2.0)), dtype=torch.float64)


@many
@given(draws())
def test_temperature_stays_within_its_ratio(draw):
    _, _, tau, base = draw
    t = temperature(tau, base)
    assert t.max() / t.min() <= RHO * (1 + 1e-12)
    assert torch.all(t > 0)


@many
@given(draws(), st.floats(-100, 100))
def test_adding_a_constant_changes_nothing(draw, constant):
    z, bias, tau, base = draw
    before = scores(z, bias, tau, base)
    after = scores(z + constant, bias, tau, base)
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


def test_raw_temperature_reads_the_arbitrary_constant():
    z = torch.tensor([[1.0, 0.5]])
    tau = torch.tensor([math.log(2) / 2, -math.log(2) / 2])
    best = [raw_scores(z + c, tau).argmax().item() for c in (0.0, 10.0)]
    assert best == [1, 1] or best[0] != best[1]
    assert raw_scores(z - 10, tau).argmax().item() == 0
    assert best[1] == 1, "raw division flips the winner once the offset is large: why deficits are divided"


@many
@given(draws())
def test_the_best_stays_best_for_every_temperature(draw):
    z, bias, tau, base = draw
    assert torch.equal(scores(z, bias, tau, base).argmax(-1), (z + bias).argmax(-1))


@many
@given(draws())
def test_a_hotter_expert_never_gets_less_access(draw):
    z, bias, tau, base = draw
    hotter = tau.clamp(-0.3, 0.3)
    warmed = hotter.clone()
    warmed[3] += 0.04
    before = scores(z, bias, hotter, base)[:, 3]
    after = scores(z, bias, warmed, base)[:, 3]
    assert torch.all(after >= before)


@many
@given(draws())
def test_order_survives_every_temperature_exactly_beyond_the_margin(draw):
    z, bias, tau, base = draw
    d = deficit(z + bias)
    s = scores(z, bias, tau, base)
    ahead = d.unsqueeze(2) * RHO * (1 + 1e-9) < d.unsqueeze(1)  # d_B > rho d_A
    assert torch.all((s.unsqueeze(2) > s.unsqueeze(1))[ahead])


def test_the_margin_is_tight():
    bound = math.log(RHO) / 2
    tau = torch.tensor([0.0, -bound, bound], dtype=torch.float64)  # A coldest, B hottest
    for d_b, stays in ((RHO * 1.0 + 1e-6, True), (RHO * 1.0 - 1e-6, False)):
        z = torch.tensor([[0.0, -1.0, -d_b]], dtype=torch.float64)
        s = scores(z, torch.zeros(3, dtype=torch.float64), tau, ONE.double())[0]
        assert (s[1] > s[2]).item() is stays


@many
@given(draws(), st.floats(0.01, 2.0))
def test_a_bounded_bias_cannot_beat_a_larger_margin(draw, bound):
    z, bias, tau, base = draw
    bias = bias.clamp(-bound, bound)
    top = z.topk(2, dim=-1)
    clear = top.values[:, 0] - top.values[:, 1] > 2 * bound
    assert torch.equal(scores(z, bias, tau, base).argmax(-1)[clear], top.indices[clear, 0])


@many
@given(draws())
def test_kl_of_a_shift_is_bounded_by_its_range(draw):
    z, bias, tau, base = draw
    # What a field can do to the distribution of an unscaled router, through the map's own scores.
    p, q = scores(z, bias, 0 * tau, 0 * base + 1).log_softmax(-1), z.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert torch.all(kl <= (bias.max() - bias.min()) ** 2 / 8 + 1e-12)


def steered(z, bias, tau, base):
    """Scores of the second of two layers, the first of which is neutral."""
    steering = Steering(2, N, 2, 4, SteeringConfig())
    steering.pressure[1], steering.log_temperature[1] = bias, tau
    steering.base_temperature.fill_(base)
    steering.refresh()
    return steering.scores(1, z)


@many
@given(draws())
def test_neutral_temperature_leaves_the_logits_as_they_are(draw):
    z, bias, _, _ = draw
    z, bias = z.float(), bias.float()
    assert torch.equal(steered(z, bias, torch.zeros(N), 1), z + bias)


@many
@given(draws())
def test_steering_uses_the_map_on_its_fields(draw):
    z, bias, tau, base = (x.float() for x in draw)
    assert torch.equal(steered(z, bias, tau, base), scores(z, bias, tau, base))


def test_gumbel_top1_samples_the_softmax():
    torch.manual_seed(0)
    z = torch.tensor([0.0, 1.0, 2.0]).expand(200_000, 3)
    share = torch.bincount((z + gumbel_like(z, ONE)).argmax(-1), minlength=3) / len(z)
    torch.testing.assert_close(share, z[0].softmax(-1), rtol=0, atol=0.005)


@pytest.mark.parametrize("out", [0, 3, 7])
def test_an_unavailable_expert_changes_no_bit_of_the_others(out):
    z = torch.randn(100, N)
    available = torch.ones(N, dtype=torch.bool)
    available[out] = False
    p = open_probabilities(z, available)
    assert torch.equal(p[:, available], z[:, available].softmax(-1))
    assert torch.all(p[:, out] == 0)


@many
@given(st.integers(0, 10_000), st.sampled_from([0.25, 0.7, 1.0, 1.25]))
def test_capacity_is_never_exceeded_and_earlier_positions_go_first(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randn(20, N, generator=generator).topk(2).indices
    counted = torch.rand(20, generator=generator) > 0.2
    capacity = math.ceil(factor * 2 * counted.sum().item() / N - 1e-9)
    kept = within_capacity(chosen, N, torch.tensor(capacity), counted, 5)  # four sequences of five
    order = [(position, k, row) for position in range(5) for k in range(2) for row in range(4)]
    for expert in range(N):
        queue = [(5 * row + p, k) for p, k, row in order if counted[5 * row + p] and chosen[5 * row + p, k] == expert]
        seated = [(t, k) for t, k in queue if kept[t, k]]
        assert seated == queue[:capacity]
