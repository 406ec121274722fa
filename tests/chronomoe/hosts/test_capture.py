"""What was decided for each token is what is counted, and what a model that halts lets each token run."""

import pytest
import torch

from chronomoe.experts.attachment import attach_expert
from chronomoe.hosts.attach import moe_layers
from chronomoe.hosts.capture import capture_choices, count_routing, measure_routing
from tests.chronomoe.experts.conftest import BASES, build_base, build_expert
from tests.chronomoe.hrm.building import build, tokens


def test_choices_are_those_that_are_counted():
    model, row = build_base("mixtral"), tokens(rows=1)
    found, counted = capture_choices(model, row), measure_routing(model, row)
    for layer, chosen in enumerate(found.chosen):
        share = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
        torch.testing.assert_close(share, counted.share[layer])
    torch.testing.assert_close(found.weights.sum(dim=-1), torch.ones(found.weights.shape[:2]))
    torch.testing.assert_close(found.logits, model(input_ids=row).logits[0])
    assert (found.segments, found.open_at) == (None, {})


def test_a_token_that_halted_keeps_the_choice_of_its_own_last_segment():
    model, row = build(), tokens(rows=1)
    last = capture_choices(model, row)
    each = [capture_choices(model, row, segment) for segment in range(3)]
    assert {1, 3} <= set(last.segments.tolist())
    for at, ran in enumerate(last.segments.tolist()):
        assert (last.chosen[:, at] == each[ran - 1].chosen[:, at]).all()
        assert all((each[later].chosen[:, at] == -1).all() for later in range(ran, 3))
        assert (each[ran - 1].chosen[:, at] >= 0).all()
    assert len(last.chosen) == len(moe_layers(model)) == 3


@pytest.mark.parametrize("family", BASES)
def test_open_gates_are_captured_for_each_token(family):
    model, row = build_base(family), tokens(rows=1)
    expert = build_expert("laws")
    attach_expert(model, expert)
    with count_routing(model) as counts:
        found = capture_choices(model, row)
    assert 0 < int(found.open_at["laws"].sum()) == counts.tokens_open["laws"]
    assert counts.tokens_seen == {"laws": row.numel()}
    expert.forced = torch.arange(row.shape[1]) % 3 == 0
    with count_routing(model) as counts:
        found = capture_choices(model, row)
    assert found.open_at["laws"].tolist() == expert.forced.tolist()
    assert counts.tokens_seen == {"laws": 0}, "its gate decided nothing"
