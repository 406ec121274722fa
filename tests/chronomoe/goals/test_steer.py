"""Goals turned on and off: what moves, by how much, and that nothing else does."""

import itertools

import pytest
import torch

import chronomoe
from chronomoe.errors import ConfigError
from chronomoe.experts.attachment import attach_expert
from chronomoe.goals.field import output_kl
from chronomoe.goals.settings import GoalSettings
from chronomoe.goals.steer import Goal, turn_off, turn_on
from chronomoe.hosts.capture import count_routing, measure_routing
from tests.chronomoe.conftest import build_host
from tests.chronomoe.everything import differing, everything
from tests.chronomoe.experts.conftest import BASES, VOCAB, build_base, build_expert


def rows(n=8, seed=3, length=24):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def tokens_open(model, tokens):
    """Tokens at which the gate of the attached expert opens."""
    with count_routing(model) as counts:
        logits(model, tokens)
    return sum(counts.tokens_open.values())


@pytest.mark.parametrize("family", BASES)
def test_on_is_bounded_and_measured_and_off_is_what_was_before(family):
    model = build_base(family)
    attach_expert(model, build_expert(threshold=1.0))
    tokens, before, state = rows(seed=4), None, everything(model)
    before = logits(model, tokens)
    goal = Goal(text="licences", experts=("licences", "gone"), slots=((0, 1), (None, 3)))
    effect = turn_on(model, [goal], GoalSettings(kl=0.005), rows(40))
    assert getattr(model.model, "tokens_run", 0) == 0
    g = model.steering.goal_bias
    torch.testing.assert_close(g.sum(dim=-1), torch.zeros(len(g)), atol=1e-6, rtol=0)
    assert 0 < g.abs().max() <= 1
    assert effect.within_budget
    assert effect.kl == pytest.approx(0.005, rel=0.05)
    assert output_kl(model, rows(40))(g.clone()) == pytest.approx(effect.kl, rel=1e-4)
    assert effect.missing == ["gone"]
    assert effect.priors == {"licences": 3.0}
    assert [0, 1] in effect.linked
    assert effect.share_after[1][3] > effect.share_before[1][3]
    assert not torch.equal(logits(model, tokens), before)
    prior = f"subbrains.{model.subbrains.by_id('licences').uid}.gate.prior"
    assert differing(everything(model), state) == ["steering.goal_bias", prior]
    assert not {"steering.goal_bias", prior} & model.state_dict().keys()
    turn_off(model)
    assert torch.equal(logits(model, tokens), before)
    assert not differing(everything(model), state)


@pytest.mark.parametrize("family", BASES)
def test_evidence_to_the_contrary_still_closes_the_gate(family):
    model = build_base(family)
    expert = build_expert(threshold=0.0)
    attach_expert(model, expert)
    turn_on(model, [Goal(text="x", experts=("licences",))], GoalSettings(strength=5))
    assert tokens_open(model, rows())
    with torch.no_grad():
        expert.gate.direction.zero_()
        expert.gate.offset.fill_(-50.0)
    assert not tokens_open(model, rows())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_any_steered_model_follows_its_links(family):
    model = build_host(family).eval()
    chronomoe.attach(model)
    tokens = torch.randint(0, model.config.vocab_size, (20, 24), generator=torch.Generator().manual_seed(0))
    before = logits(model, tokens)
    effect = turn_on(model, [Goal(text="x", slots=((0, 2),))], GoalSettings(beta=1.0), tokens)
    assert effect.share_after[0][2] > effect.share_before[0][2]
    assert effect.kl == pytest.approx(output_kl(model, tokens)(model.steering.goal_bias.clone()))
    turn_off(model)
    assert torch.equal(logits(model, tokens), before)


def test_goals_average_by_weight_and_never_add_up():
    model = build_base("mixtral")
    attach_expert(model, build_expert("a", seed=1))
    attach_expert(model, build_expert("b", seed=2))

    def priors(*goals):
        return turn_on(model, goals, GoalSettings(strength=4)).priors

    assert priors(Goal(text="1", experts=("a",))) == {"a": 4.0}
    assert priors(Goal(text="1", experts=("a",)), Goal(text="2", experts=("a",))) == {"a": 4.0}
    assert priors(Goal(text="1", experts=("a",)), Goal(text="2", experts=("b",))) == {"a": 2.0, "b": 2.0}
    assert priors(Goal(text="1", experts=("a",), weight=0.5)) == {"a": 2.0}
    assert [float(e.gate.prior) for e in model.subbrains.attached] == [2.0, 0.0]
    model.subbrains.by_id("a").active = False
    effect = turn_on(model, [Goal(text="1", experts=("a", "b"))])
    assert effect.priors == {"b": 3.0}
    assert effect.missing == ["a"]
    # Fields as well: two equal goals are one, of two that differ each has half.
    one = turn_on(model, [Goal(text="1", slots=((0, 1),))], GoalSettings(beta=1.0))
    field = model.steering.goal_bias.clone()
    turn_on(model, [Goal(text="1", slots=((0, 1),)), Goal(text="2", slots=((0, 1),))], GoalSettings(beta=1.0))
    assert torch.equal(model.steering.goal_bias, field)
    turn_on(model, [Goal(text="1", slots=((0, 1),)), Goal(text="2", slots=((0, 2),))], GoalSettings(beta=1.0))
    assert model.steering.goal_bias[0, 1] == model.steering.goal_bias[0, 2] > 0
    assert one.kl is None


@pytest.mark.parametrize("family", BASES)
def test_a_stronger_goal_opens_a_gate_no_later_and_shuts_none(family):
    model = build_base(family)
    expert = build_expert(threshold=0.8)
    attach_expert(model, expert)
    firsts, opened = [], []
    for strength in (0.0, 1.0, 2.0, 3.0, 5.0):
        turn_on(model, [Goal(text="x", experts=("licences",))], GoalSettings(strength=strength))
        places = []
        for row in rows(12, seed=5):
            length = next((n for n in range(1, 25) if tokens_open(model, row[None, :n])), 99)
            places.append(length)
        firsts.append(places)
        opened.append(tokens_open(model, rows(12, seed=5)))
    for weaker, stronger in itertools.pairwise(firsts):
        assert all(later >= sooner for later, sooner in zip(weaker, stronger, strict=True))
    assert opened == sorted(opened)
    assert opened[0] < opened[-1]
    assert firsts[0] != firsts[-1]


def test_a_goal_turned_on_between_two_tokens_changes_only_later_ones():
    model = build_base("mixtral")
    attach_expert(model, build_expert(threshold=3.0))
    tokens = rows(2, seed=6)
    whole_off = logits(model, tokens)
    with torch.no_grad():
        first = model(tokens[:, :10], use_cache=True)
        goals = [Goal(text="x", experts=("licences",), slots=((1, 2),))]
        turn_on(model, goals, GoalSettings(strength=5, beta=1.0))
        second = model(tokens[:, 10:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(first.logits, whole_off[:, :10])
    assert not torch.allclose(second, whole_off[:, 10:], atol=1e-3)


def test_likeness_prefers_who_usually_receives_such_text():
    model = build_base("mixtral")
    from chronomoe.hosts.capture import gate_inputs

    inputs = gate_inputs(model, [0, 1, 2], rows(1, seed=9))
    for layer, h in inputs.items():
        model.steering.direction[layer, 2] = torch.nn.functional.normalize(h[0].mean(dim=0), dim=-1)
        model.steering.direction[layer, 3] = -model.steering.direction[layer, 2]
    goal = Goal(text="x", tokens=tuple(rows(1, seed=9)[0].tolist()))
    turn_on(model, [goal], GoalSettings(beta=0.5, likeness=1.0))
    g = model.steering.goal_bias
    assert (g.argmax(dim=-1) == 2).all()
    assert (g.argmin(dim=-1) == 3).all()
    turn_on(model, [Goal(text="y", tokens=goal.tokens, slots=((None, 0),))], GoalSettings(beta=0.5, likeness=0.1))
    assert (model.steering.goal_bias.argmax(dim=-1) == 0).all()


def test_the_field_acts_in_the_chosen_layers_only_and_says_when_a_budget_is_out_of_reach():
    model = build_base("mixtral")
    effect = turn_on(model, [Goal(text="x", slots=((None, 1),))], GoalSettings(kl=5.0, layers=(2,)), rows(4))
    assert not model.steering.goal_bias[:2].any()
    assert not effect.within_budget
    assert effect.beta == 1.0
    event = effect.to_json()
    assert event["event"] == "goal_bias"
    assert event["kl"] < event["kl_budget"] == 5.0
    assert event["experts"] == ["2.1"]


@pytest.mark.parametrize(
    ("goal", "settings", "sentence"),
    [
        (Goal(text="x", slots=((0, 1),)), GoalSettings(), "needs text to measure"),
        (Goal(text="x", slots=((0, 1),)), GoalSettings(beta=1, layers=(3,)), "there are layers 0 to 2"),
        (Goal(text="x"), GoalSettings(beta=1, likeness=1), "usually receive"),
    ],
)
def test_what_cannot_be_is_said_and_what_was_on_stays_on(goal, settings, sentence):
    model = build_base("mixtral")
    turn_on(model, [Goal(text="before", slots=((1, 2),))], GoalSettings(beta=0.5))
    before = model.steering.goal_bias.clone()
    with pytest.raises(ConfigError, match=sentence):
        turn_on(model, [goal], settings)
    assert before.any()
    assert torch.equal(model.steering.goal_bias, before)


def test_what_is_not_there_is_told_and_weakens_nobody():
    model = build_base("mixtral")
    attach_expert(model, build_expert("a"))
    model.steering.available[0, 3] = False
    here = Goal(text="here", experts=("a",), slots=((1, 2),))
    turn_on(model, [here], GoalSettings(beta=0.5))
    alone = model.steering.goal_bias.clone()
    elsewhere = [
        Goal(text="gone", experts=("b",), slots=((7, 1), (0, 4), (0, 3))),
        Goal(text="nobody's", weight=0.5),
    ]
    effect = turn_on(model, [*elsewhere, here], GoalSettings(beta=0.5))
    assert effect.priors == {"a": 3.0}
    assert torch.equal(model.steering.goal_bias, alone)
    assert effect.goals == ["here"]
    assert effect.idle == ["gone", "nobody's"]
    assert effect.missing == ["b", "7.1", "0.4", "0.3"]
    assert effect.to_json()["experts"] == ["a", "1.2"]
    assert turn_on(model, elsewhere, GoalSettings(beta=0.5)).goals == []
    assert not model.steering.goal_bias.any()
    # An expert closed in some layers only is asked for in the others.
    assert [0, 3] not in turn_on(model, [Goal(text="x", slots=((None, 3),))], GoalSettings(beta=0.5)).linked


def test_a_heavier_goal_asks_for_more():
    model = build_base("mixtral")
    goals = [Goal(text="1", slots=((0, 1),)), Goal(text="2", slots=((0, 2),), weight=0.5)]
    turn_on(model, goals, GoalSettings(beta=1.0))
    g = model.steering.goal_bias[0]
    # Affinities 1 and 0.5 of four experts, less their mean 0.375, over the largest of those.
    torch.testing.assert_close(g, torch.tensor([-0.6, 1.0, 0.2, -0.6]), atol=1e-6, rtol=0)


def test_who_cannot_be_moved_is_counted():
    model = build_base("mixtral")
    effect = turn_on(model, [Goal(text="x", slots=((0, 2),))], GoalSettings(beta=0.3), rows(12))
    assert effect.protected[1:] == [1.0, 1.0]  # no field there
    assert 0 < effect.protected[0] < 1
    field = model.steering.goal_bias
    turn_off(model)
    reach = effect.beta * 4 / 3  # one expert of four: the largest s is 1, the smallest -1/3
    assert effect.protected[0] == pytest.approx(
        measure_routing(model, rows(12), torch.tensor([reach, 0, 0])).protected[0]
    )
    assert field is model.steering.goal_bias


@pytest.mark.parametrize("wrong", [{"strength": -1}, {"strength": 5.1}, {"strength": float("nan")}, {"kl": 0},
                                   {"kl": float("nan")}, {"beta": 2}, {"likeness": 1.5}])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"goal {next(iter(wrong))} is"):
        GoalSettings(**wrong)


def test_no_goal_is_no_effect_and_a_dense_model_has_nothing_to_act_on():
    model = build_base("mixtral")
    assert turn_on(model, []).goals == []
    with pytest.raises(ConfigError, match="nothing to act on"):
        turn_on(torch.nn.Linear(2, 2), [Goal(text="x")])
