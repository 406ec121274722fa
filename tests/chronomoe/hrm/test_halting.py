"""When a token stops: the target, who learns, who is forced on, cap and exact mode."""

import pytest
import torch

from chronomoe.hrm.halting import forced_segments, segment_loss
from tests.chronomoe.hrm.building import build, tokens


def losses(ce, active=None, halt=None, gain=0.02):
    """Segments by tokens, one row."""
    ce = torch.tensor(ce).unsqueeze(1)
    active = torch.ones_like(ce, dtype=torch.bool) if active is None else torch.tensor(active).bool().unsqueeze(1)
    halt = torch.zeros_like(ce) if halt is None else torch.tensor(halt).unsqueeze(1).requires_grad_()
    return segment_loss(ce, halt, active, torch.ones_like(ce[0], dtype=torch.bool), gain), halt


def test_a_token_counts_the_mean_of_the_segments_it_ran():
    found, _ = losses([[2.0, 4.0], [1.0, 9.0]], active=[[1, 1], [1, 0]])
    assert found.ce.item() == pytest.approx((1.5 + 4.0) / 2)
    assert found.used_segments.item() == pytest.approx(1.5)


@pytest.mark.parametrize(("gain", "direction"), [(1.0, -1), (0.0, 1), (-1.0, 1)])
def test_the_head_learns_to_halt_where_the_next_segment_gains_too_little(gain, direction):
    found, halt = losses([[3.0], [3.0 - gain]], halt=[[0.0], [0.0]])
    found.bce_halt.backward()
    assert -halt.grad[0].sign().item() == direction, "downhill"
    assert halt.grad[1] == 0, "of the last segment nothing is known"


def test_halting_is_decided_by_the_expected_gain():
    """Where gains are noise about their mean, the best logit is above 0 exactly if the mean is below the threshold."""
    generator = torch.Generator().manual_seed(0)
    for mean, halts in ((0.06, False), (0.0, True)):
        noise = torch.randn(40_000, generator=generator)
        target = (0.02 - (mean + noise)).sigmoid().mean()
        assert bool(target > 0.5) is halts


def test_what_was_not_run_teaches_nothing():
    found, halt = losses([[3.0], [1.0]], active=[[1], [0]], halt=[[0.0], [0.0]])
    found.bce_halt.backward()
    assert halt.grad.abs().sum() == 0


def test_the_head_watches_and_does_not_bend_the_model():
    model, x = build(halting="max", use_moe=False).train(), tokens()
    model(x, labels=x).loss.backward()
    assert model.model.halt_head.weight.grad.any()
    model.zero_grad()
    torch.stack(model.model(x).halt_logits).sum().backward()
    bent = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert bent == ["model.halt_head.weight", "model.halt_head.bias"]


def test_a_fresh_model_does_not_halt():
    model = build(thoughtful=False)
    assert torch.all(model(tokens()).segments == 3)


def test_exploration_forces_a_share_of_tokens_on():
    torch.manual_seed(0)
    forced = forced_segments(torch.zeros(100, 100), 4, 0.3)
    assert (forced > 1).float().mean().item() == pytest.approx(0.3, abs=0.02)
    counts = torch.bincount(forced.flatten(), minlength=5)[2:5].float() / (forced > 1).sum()
    assert counts.min() > 0.3
    model = build(halt_exploration=1.0).train()
    with torch.no_grad():
        model.model.halt_head.bias.fill_(100.0)
    segments = model(tokens(8), labels=tokens(8)).segments
    assert segments.min() == 2, "all are forced to a second segment at least, though all would halt"
    assert segments.max() == 3
    model.eval()
    assert torch.all(model(tokens()).segments == 1), "not in use"


def test_cap_and_full_depth():
    model, x = build(), tokens()
    exact = model(x).segments
    model.model.halt_cap = 2
    assert torch.equal(model(x).segments, exact.clamp(max=2))
    model.model.halting = "max"
    assert torch.all(model(x).segments == 2)
    model.model.halt_cap = None
    assert torch.all(model(x).segments == 3)


def test_a_halted_token_keeps_its_state_and_is_still_attended_to():
    model, x = build(), tokens(1)
    output = model(x)
    early = (output.segments[0] == 1).nonzero().flatten()
    late = (output.segments[0] == 3).nonzero().flatten()
    assert early[0] < late[-1]
    for state in output.states[1:]:
        assert torch.equal(state[0, early], output.states[0][0, early])
    changed = x.clone()
    changed[0, early[0]] = (changed[0, early[0]] + 1) % 61
    assert (model(changed).states[-1][0, late[-1]] - output.states[-1][0, late[-1]]).abs().max() > 1e-4
