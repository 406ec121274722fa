"""The domain gate: its formula, its state, what it is fitted and calibrated to."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.experts.gate import DomainGate, false_alarm_threshold


def gate(leak=0.9, prior=0.0):
    made = DomainGate(8)
    made.leak.fill_(leak)
    made.prior.fill_(prior)
    return made


@given(st.integers(0, 10_000), st.floats(0.1, 1.0), st.floats(-3, 3), st.booleans())
def test_log_odds_are_the_recurrence_of_the_formula(seed, leak, prior, padded):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 11, generator=generator)
    counted = torch.rand(2, 11, generator=generator) < 0.7 if padded else torch.ones(2, 11, dtype=torch.bool)
    found, state = gate(leak, prior).log_odds(x, counted)
    for row in range(2):
        s = n = 0.0
        for place in range(11):
            if counted[row, place]:
                s, n = leak * s + x[row, place].item(), leak * n + 1
            assert found[row, place].item() == pytest.approx(s / math.sqrt(n + 4) + prior, rel=1e-4, abs=1e-4)
        assert state[row].tolist() == pytest.approx([s, n], rel=1e-4, abs=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 10))
def test_in_two_parts_as_in_one(seed, cut):
    x = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))
    whole, last = gate().log_odds(x)
    first, state = gate().log_odds(x[:, :cut])
    second, end = gate().log_odds(x[:, cut:], state_B2=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-4)


def test_what_was_fitted_is_told_from_the_rest_and_a_shift_of_everything_is_no_evidence():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    shifts = 0.3 * torch.randn(3, 8, generator=generator)

    def draw(kind, texts, shift=0.0):
        h = (torch.randn(texts, 40, 8, generator=generator) + shifts[kind]) @ mixing + shift
        return {0: h, 2: 0.1 * torch.randn(texts, 40, 8, generator=generator)}

    for shift, leak in ((0.0, 0.99), (5.0, 0.99), (5.0, 0.0)):
        made = DomainGate(8, (0, 2))
        made.leak.fill_(leak)
        made.fit(draw(0, 200, shift), [draw(1, 200, shift), draw(2, 50, shift)])
        odds = [made.log_odds(made.evidence(draw(kind, 100, shift)))[0] for kind in range(3)]
        assert odds[0][:, -1].mean() > 0.5
        assert max(other[:, -1].mean() for other in odds[1:]) < -0.5
        if leak:
            assert odds[0][:, -1].mean() > odds[0][:, 3].mean()


def test_the_fit_looks_at_sums_of_evidence_not_at_tokens():
    """One loud coordinate tells single tokens apart, a quiet one whole texts: only the second can be relied upon."""
    generator = torch.Generator().manual_seed(0)

    def draw(inside, texts=300):
        h = torch.randn(texts, 64, 2, generator=generator)
        h[..., 0] += 2 * torch.randn(texts, 1, generator=generator) + (1.0 if inside else -1.0)  # a topic of each text
        h[..., 1] += 0.25 if inside else -0.25
        return {0: h}

    made = DomainGate(2)
    made.fit(draw(True), [draw(False)])
    assert made.direction[0, 1] > 3 * made.direction[0, 0] > 0


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 0.02, 0.3]))
def test_no_domain_has_more_false_alarms_than_allowed(seed, share):
    generator = torch.Generator().manual_seed(seed)
    odds = [torch.randn(300, generator=generator), 2 + torch.randn(200, generator=generator)]
    threshold = false_alarm_threshold(odds, share)
    assert max(float((values > threshold).float().mean()) for values in odds) <= share + 1e-6
    assert share == 0 or float((odds[1] > threshold).float().mean()) >= share - 2 / 200


@given(st.integers(0, 10_000), st.floats(0, 5))
def test_a_goal_is_so_many_nats_that_evidence_can_take_back(seed, nats):
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed))
    without, state = gate(leak=0.99).log_odds(x)
    hopeful, same = gate(leak=0.99, prior=nats).log_odds(x)
    torch.testing.assert_close(hopeful - without, torch.full_like(x, nats), atol=1e-5, rtol=1e-5)
    assert torch.equal(state, same)  # what was heard knows nothing of goals
    contrary, _ = gate(leak=0.99, prior=nats).log_odds(torch.full((1, 60), -1.0))
    assert contrary[0, -1] < 0
