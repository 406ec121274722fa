"""Valleys and ridges are found where they are; noise, even slow noise, is no landscape."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.control.landscape import null_variance, valleys_and_ridges


def test_cold_is_a_valley_and_hot_a_ridge():
    tau = torch.tensor([0.0, 0.01, -0.3, 0.009, 0.4, -0.01, -0.009, 0.0])
    assert valleys_and_ridges(tau) == ([2], [4])


def test_a_flat_field_has_neither():
    assert valleys_and_ridges(torch.zeros(8)) == ([], [])
    assert valleys_and_ridges(torch.randn(8) * 1e-4) == ([], [])


@given(st.permutations(range(6)))
def test_numbering_does_not_matter(order):
    tau = torch.tensor([-0.5, -0.05, 0.0, 0.03, 0.05, 0.6])
    valleys, ridges = valleys_and_ridges(tau[list(order)])
    assert sorted(order[k] for k in valleys) == valleys_and_ridges(tau)[0]
    assert sorted(order[k] for k in ridges) == valleys_and_ridges(tau)[1]


def test_persistent_experts_beat_the_null_and_drifting_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 8, generator=generator) * 0.1
    weights = torch.full((40,), 1 / 40)
    formed = noise + torch.linspace(-0.2, 0.2, 8)
    for blocks, beats in ((formed, True), (noise, False)):
        variance = blocks.mean(0).var(unbiased=False).item()
        assert (variance > null_variance(blocks, weights)) is beats


def test_the_null_draws_from_no_common_generator():
    state = torch.get_rng_state()
    null_variance(torch.randn(5, 4), torch.full((5,), 0.2))
    torch.randn(5, 4)
    assert null_variance(torch.ones(5, 4), torch.full((5,), 0.2)) < 1e-10
    torch.set_rng_state(state)
    null_variance(torch.ones(5, 4), torch.full((5,), 0.2))
    assert torch.equal(torch.get_rng_state(), state)
