"""R is near 1 for stable directions, near 0 for random ones, and corrected for its own start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.control.coherence import expert_coherence, layer_coherence, update_direction
from tests.chronomoe.draws import many


def run(directions, memory=0.98):
    """``directions`` (steps, L, N, D)."""
    direction, forgotten = torch.zeros(directions.shape[1:]), torch.ones(directions.shape[1:-1])
    for step in directions:
        update_direction(direction, forgotten, step, memory)
    return direction, forgotten


@many
@given(st.integers(2, 40), st.integers(0, 1000))
def test_one_direction_is_coherent_from_the_second_step_whatever_its_length(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(steps, 2, 4, 1, generator=generator) + 0.1
    same = torch.randn(1, 2, 4, 16, generator=generator) * lengths
    coherence = expert_coherence(*run(same), 0.98)
    torch.testing.assert_close(coherence, torch.ones(2, 4), atol=1e-3, rtol=0)


def test_random_directions_read_zero_on_average_at_any_age():
    generator = torch.Generator().manual_seed(0)
    for steps in (3, 10, 50, 400):
        direction, forgotten = run(torch.randn(steps, 500, 8, 24, generator=generator))
        squared = (direction.norm(dim=-1) / (1 - forgotten)).square().mean()
        chance = (1 - 0.98) / (1 + 0.98) * (1 + 0.98**steps) / (1 - 0.98**steps)
        assert squared.item() == pytest.approx(chance, rel=0.05)


def test_one_window_says_nothing():
    coherence = expert_coherence(*run(torch.randn(1, 1, 4, 8)), 0.98)
    assert coherence.tolist() == [[0, 0, 0, 0]]


def test_an_expert_without_tokens_keeps_its_direction():
    steady = torch.randn(1, 1, 2, 8).repeat(30, 1, 1, 1)
    steady[10:, :, 1] = 0
    direction, forgotten = run(steady)
    assert forgotten[0, 1] == pytest.approx(0.98**10)
    torch.testing.assert_close(expert_coherence(direction, forgotten, 0.98), torch.ones(1, 2), atol=1e-3, rtol=0)


def test_a_layer_is_weighted_by_load():
    coherence, load = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.75, 0.25]])
    assert layer_coherence(coherence, load).item() == pytest.approx(0.75)
