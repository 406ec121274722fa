"""The goal field: its conservation laws, its budget, whom it cannot move."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.goals.field import biased, centred, find_beta, output_kl
from chronomoe.goals.settings import CAP
from chronomoe.hosts.attach import moe_layers
from chronomoe.hosts.capture import measure_routing, protected
from chronomoe.routing.state import SteeringConfig
from chronomoe.routing.steering import Steering
from tests.chronomoe.experts.conftest import VOCAB, build_base

seeds = st.integers(0, 10_000)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.integers(2, 9))
def test_rows_sum_to_nothing_and_the_largest_is_one(seed, experts):
    affinity, available = drawn(seed, 3, experts), drawn(seed + 1, 3, experts) > -0.5
    s = centred(affinity, available)
    torch.testing.assert_close(s.sum(dim=-1), torch.zeros(3), atol=1e-5, rtol=0)
    assert not s[~available].any()
    assert not s.any() or s.abs().max().item() == pytest.approx(1.0)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(centred(affinity[:, order], available[:, order]), s[:, order])
    torch.testing.assert_close(centred(affinity + 3, available), s, atol=1e-4, rtol=1e-4)
    only = centred(affinity, available, [1])
    assert not only[[0, 2]].any()
    assert not centred(torch.ones(3, experts), available).any()


@given(st.floats(0.01, 5.0), st.floats(1e-4, 1.0))
def test_bisection_meets_the_budget_or_stops_at_the_cap(scale, budget):
    beta, found = find_beta(lambda size: scale * size**2, budget)
    assert 0 < beta <= CAP
    assert found == pytest.approx(budget, rel=0.05) if scale > budget else beta == CAP


def test_a_step_in_the_divergence_is_not_overstepped():
    beta, found = find_beta(lambda size: float(size > 0.3), 0.5)
    assert beta <= 0.3
    assert found == 0.0


def steering(temperature=False, seed=0):
    made = Steering(1, 6, 2, 8, SteeringConfig())
    made.pressure.copy_(0.3 * drawn(seed, 1, 6))
    if temperature:
        made.log_temperature.copy_(0.3 * drawn(seed + 1, 1, 6))
    made.refresh()
    return made


def chosen(made, z, g):
    with biased(made, g):
        made.refresh()
        return made.scores(0, z).topk(2).indices.sort().values


@given(seeds, st.floats(0.01, 2.0), st.booleans())
def test_no_field_of_that_range_moves_a_protected_token(seed, reach, temperature):
    made, z = steering(temperature, seed), drawn(seed + 2, 200, 6)
    safe = protected(made, 0, z, reach)
    before = chosen(made, z, torch.zeros(1, 6))
    for number in range(5):
        g = drawn(seed + 3 + number, 1, 6)
        g = reach * (g - g.min()) / (g.max() - g.min()) * 0.999
        assert torch.equal(chosen(made, z, g)[safe], before[safe])
    if not temperature:  # there the bound is sharp: the worst field moves all others
        moved = [chosen(made, z, reach * 1.001 * (torch.eye(6)[k] - torch.eye(6)[j])[None] / 2) != before
                 for k in range(6) for j in range(6) if j != k]  # fmt: skip
        assert bool(torch.stack(moved).any(dim=0).any(dim=-1)[~safe].all())


@given(seeds, st.integers(0, 5), st.booleans())
def test_a_linked_expert_never_gets_less_from_more(seed, expert, temperature):
    made, z = steering(temperature, seed), drawn(seed + 2, 300, 6)
    s = centred(torch.eye(6)[expert][None], made.available)
    shares = [(chosen(made, z, beta * s) == expert).sum().item() for beta in (0.0, 0.1, 0.3, 0.6, 1.0, 5.0)]
    if temperature:  # a deficit is divided by T: the best expert stays, whatever its rivals' temperatures
        assert shares[-1] >= shares[0]
    else:
        assert shares == sorted(shares)
    assert shares[-1] > shares[0]


@pytest.mark.parametrize("family", ["mixtral", "hrm"])
def test_shares_are_what_the_routers_did(family):
    model = build_base(family)
    rows = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    found = measure_routing(model, rows, torch.zeros(len(moe_layers(model))))
    torch.testing.assert_close(found.share.sum(dim=-1), torch.ones(len(found.share)))
    assert found.protected.tolist() == [1.0] * len(found.share)
    model.steering.pressure[1, 2] = 50.0  # everybody's first choice
    assert measure_routing(model, rows).share[1, 2].item() == pytest.approx(0.5)
    assert output_kl(model, rows)(torch.zeros_like(model.steering.goal_bias)) == pytest.approx(0.0, abs=1e-7)


def test_the_divergence_is_of_the_model_without_goals_from_the_one_with_and_leaves_nothing_on():
    model = build_base("mixtral")
    tokens = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    g = centred(torch.tensor([[0.0, 1, 0, 0]] * 3), torch.ones(3, 4, dtype=torch.bool)) * 3
    model.steering.goal_bias[0, 3] = 0.25
    before = model.steering.goal_bias.clone()
    found = output_kl(model, tokens)(g)
    assert torch.equal(model.steering.goal_bias, before)
    with torch.no_grad():
        with biased(model.steering, torch.zeros_like(g)):
            off = model(tokens, use_cache=False).logits.log_softmax(dim=-1)
        with biased(model.steering, g):
            on = model(tokens, use_cache=False).logits.log_softmax(dim=-1)
    assert found == pytest.approx((off.exp() * (off - on)).sum(dim=-1).mean().item(), rel=1e-4)
    backwards = (on.exp() * (on - off)).sum(dim=-1).mean().item()
    assert abs(found - backwards) > 0.01 * found  # the other direction is another number
