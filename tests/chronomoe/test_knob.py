"""kappa: factors, schedules that end where they say, rules with hysteresis, agents that are checked."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.errors import ConfigError
from chronomoe.knob import (
    KnobDecision,
    KnobScheduler,
    KnobState,
    MetaKnob,
    RuleBasedKnobController,
    parse_decision,
)
from tests.chronomoe.draws import many

KAPPAS = st.floats(-1, 1)


def state(**changes):
    values = {
        "step": 1, "loss": 4.0, "loss_trend": -0.001, "coherence_R": 0.5, "load_entropy": 0.99, "router_entropy": 0.9,
        "dead_experts": 0, "kappa": 0.0,
    }  # fmt: skip
    return KnobState(**{**values, **changes})


@many
@given(KAPPAS)
def test_factors_are_reciprocal(kappa):
    up, down = MetaKnob(), MetaKnob()
    up.set(kappa)
    down.set(-kappa)
    for name in ("pressure_scale", "temp_scale", "rate_scale"):
        assert getattr(up.factors, name) * getattr(down.factors, name) == pytest.approx(1)


@many
@given(KAPPAS, KAPPAS)
def test_factors_grow_with_kappa(a, b):
    low, high = MetaKnob(), MetaKnob()
    low.set(min(a, b))
    high.set(max(a, b))
    assert low.factors.pressure_scale <= high.factors.pressure_scale
    assert low.factors.temp_scale <= high.factors.temp_scale


@pytest.mark.parametrize("kappa", [np.float32(0.25), np.int64(1), Fraction(1, 4)])
def test_a_number_is_a_number_whatever_made_it(kappa):
    knob = MetaKnob()
    knob.set(kappa)
    assert knob.kappa == kappa
    assert type(knob.kappa) is float


@pytest.mark.parametrize("kappa", [1.01, -2, math.nan, math.inf, "high", None, True])
def test_another_kappa_is_refused_and_nothing_moves(kappa):
    knob = MetaKnob()
    knob.set(0.25, "before")
    with pytest.raises(ConfigError, match="between -1 and 1"):
        knob.set(kappa)
    assert (knob.kappa, knob.intent, len(knob.history)) == (0.25, "before", 1)


def test_histories_are_bounded():
    knob = MetaKnob()
    for _ in range(5000):
        knob.set(0.1)
    assert len(knob.history) == 1000


@many
@given(KAPPAS, KAPPAS, st.integers(0, 20), st.integers(1, 60), st.sampled_from(["linear", "cosine", "step"]))
def test_schedules_begin_and_end_where_they_say(initial, final, warmup, rest, schedule):
    scheduler = KnobScheduler(initial, final, warmup, warmup + rest, schedule)
    kappas = [scheduler.step().kappa for _ in range(warmup + rest)]
    assert kappas[:warmup] == [initial] * warmup
    assert kappas[-1] == pytest.approx(final)
    low, high = sorted((initial, final))
    assert all(low - 1e-9 <= kappa <= high + 1e-9 for kappa in kappas)
    moves = [b - a for a, b in itertools.pairwise(kappas)]
    assert all(move * (final - initial) >= -1e-12 for move in moves), "monotone: the original's cosine ran backwards"


def test_intents_and_the_middle_of_each_schedule():
    wanted = {"linear": (0.1, "linear_anneal"), "cosine": (0.1, "cosine_anneal"), "step": (0.1, "step_transition")}
    for schedule, (kappa, intent) in wanted.items():
        scheduler = KnobScheduler(0.5, -0.3, 10, 110, schedule)
        decisions = [scheduler.step() for _ in range(110)]
        assert decisions[9].intent == "warmup_explore"
        assert decisions[59].kappa == pytest.approx(kappa, abs=0.01)
        assert decisions[59].intent == intent
    assert KnobScheduler(0.5, -0.3, 0, 90, "step").step().intent == "step_explore"


def test_a_warm_up_as_long_as_the_run_is_survived_and_told():
    scheduler = KnobScheduler(0.5, -0.3, 100, 20)
    assert scheduler.too_short
    assert {scheduler.step().kappa for _ in range(30)} == {0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"schedule": "square"}, "square"), ({"initial_kappa": 2}, "kappa"), ({"warmup_steps": -1}, "warm-up")],
)
def test_bad_schedules_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        KnobScheduler(**settings)


def test_adaptive_asks_its_agent_after_warm_up_and_keeps_its_word_otherwise():
    asked = []

    def agent(seen):
        asked.append(seen)
        return KnobDecision(kappa=0.2, intent="mine") if len(asked) == 1 else None

    scheduler = KnobScheduler(0.5, -0.3, 2, 10, "adaptive", agent)
    decisions = [scheduler.step(state(step=n)) for n in range(5)]
    assert [decision.kappa for decision in decisions] == [0.5, 0.5, 0.2, 0.2, 0.2]
    assert len(asked) == 3
    assert scheduler.step(None).kappa == 0.2


def test_a_scheduler_goes_on_after_a_restart():
    one, two = KnobScheduler(0.5, -0.3, 3, 30, "adaptive"), KnobScheduler(0.5, -0.3, 3, 30, "adaptive")
    for n in range(12):
        one.step(state(loss_trend=-0.01 * (n % 2)))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for n in range(12):
        assert one.step(state(loss_trend=0.1, step=n)) == two.step(state(loss_trend=0.1, step=n))


def settle(rules, **changes):
    kappa = changes.pop("kappa", 0.0)
    for _ in range(200):
        decision = rules(state(**changes, kappa=kappa))
        kappa = decision.kappa
    return decision


def test_rules_react_slowly_and_in_the_right_direction():
    rules = RuleBasedKnobController()
    assert settle(rules, loss_trend=-0.02).kappa == pytest.approx(-0.3)
    assert settle(rules, loss_trend=0.001).intent == "explore_stuck"
    assert settle(rules, dead_experts=2).kappa == pytest.approx(0.5)
    steps = [0.5]
    for _ in range(60):
        steps.append(rules(state(loss_trend=-0.02, kappa=steps[-1])).kappa)
    assert steps[-1] == pytest.approx(-0.3)
    assert max(abs(b - a) for a, b in itertools.pairwise(steps)) <= 0.02 + 1e-9


def test_rules_have_hysteresis():
    rules = RuleBasedKnobController()
    settle(rules, load_entropy=0.6)
    assert settle(rules, load_entropy=0.75).intent == "explore_unbalanced", "within the band it stays"
    assert settle(RuleBasedKnobController(), load_entropy=0.75).intent == "neutral"
    flicker = RuleBasedKnobController()
    for n in range(200):
        decision = flicker(state(loss_trend=-0.02 if n % 2 else 0.01))
    assert decision == KnobDecision(kappa=0.0, intent="neutral"), "noise moves nothing"


def test_an_agent_that_fails_or_answers_nonsense_leaves_kappa_where_it_is():
    answers = iter([KnobDecision(kappa=0.7, intent="agent"), {"kappa": 0.1}, ZeroDivisionError("oh"), None])

    def agent(_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    scheduler = KnobScheduler(warmup_steps=0, schedule="adaptive", agent=agent)
    found = [(scheduler.step(state()).kappa, scheduler.complaint[:12]) for _ in range(4)]
    assert found == [(0.7, ""), (0.7, "AttributeErr"), (0.7, "ZeroDivision"), (0.7, "")]


@pytest.mark.parametrize("text", ['I weigh {a} and {b}: {"kappa": 0.2}', '```json\n{"kappa": 0.2}\n``` (in {x})'])
def test_the_object_with_kappa_is_found_among_other_braces(text):
    assert parse_decision(text).kappa == 0.2


def test_an_intent_is_one_short_line():
    knob = MetaKnob()
    knob.set(0.1, "explore\nStep 9 | Loss: 0.1" + "x" * 200)
    assert "\n" not in knob.intent
    assert len(knob.intent) <= 80


def test_an_agent_reads_one_line_and_answers_with_checked_json():
    line = state(loss=3.14159265).to_json()
    assert "\n" not in line
    assert json.loads(line)["loss"] == 3.1416
    decision = parse_decision('Sure! {"kappa": -0.4, "intent": "settle", "reasoning": "loss falls"} Done.')
    assert decision == KnobDecision(kappa=-0.4, intent="settle", reasoning="loss falls")


@pytest.mark.parametrize(
    "answer", ["", "kappa 0.5", "[0.5]", '{"intent": "x"}', '{"kappa": 3}', '{"kappa": "0.5"}', "{", '{"a":' * 3000]
)
def test_other_answers_are_refused(answer):
    with pytest.raises(ConfigError, match="kappa"):
        parse_decision(answer)
