"""Temperature: hot means more access, averages are convex, the signs of every loop are right."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.control.config import ControlConfig
from chronomoe.control.landscape import BLOCK
from chronomoe.control.state import ControlState
from chronomoe.control.temperature import centred, effective_temperature, fast_temperature
from chronomoe.control.tick import effective_temperature as effective
from chronomoe.control.tick import move_temperature
from chronomoe.knob import KnobFactors, MetaKnob
from tests.chronomoe.draws import many

CONFIG = ControlConfig()


@st.composite
def states(draw):
    n, layers = draw(st.integers(2, 12)), 64
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda: torch.rand(layers, n, generator=generator)  # noqa: E731
    return rand() * 3 - 2, rand(), rand(), rand() * 2 - 1


@many
@given(states())
def test_fast_temperature_is_centred_and_bounded(state):
    tau = fast_temperature(*state, CONFIG)
    assert tau.sum(-1).abs().max() < 1e-5
    assert tau.abs().max() <= CONFIG.beta_usage + CONFIG.beta_recovery + CONFIG.beta_specialist


@many
@given(states(), st.integers(0, 1), st.floats(0.01, 1))
def test_more_load_never_heats_an_expert_and_less_coherence_never_cools_it(state, expert, amount):
    error, recovering, coherence, health = state
    busier = error.clone()
    busier[:, expert] -= amount
    assert torch.all(
        fast_temperature(busier, recovering, coherence, health, CONFIG)[:, expert]
        <= fast_temperature(*state, CONFIG)[:, expert] + 1e-6
    )
    looser = coherence.clone()
    looser[:, expert] *= 1 - amount
    assert torch.all(
        fast_temperature(error, recovering, looser, health, CONFIG)[:, expert]
        >= fast_temperature(*state, CONFIG)[:, expert] - 1e-6
    )


@many
@given(states(), st.floats(0, 1))
def test_an_average_stays_between_its_arguments_and_keeps_the_mean(state, rate):
    error, *known = state
    config = ControlConfig(eta_structural_T_local=rate, eta_structural_T_global=rate)
    state_now = ControlState(*error.shape, 4)
    for buffer, value in zip((state_now.recovering, state_now.coherence, state_now.health), known, strict=True):
        buffer.copy_(value)
    old = centred(state[1])
    state_now.structural_T_local.copy_(old)
    move_temperature(state_now, error, config, KnobFactors(), 1)
    now, new = state_now.structural_T_local, fast_temperature(*state, config)
    assert torch.all(now >= torch.minimum(old, new) - 1e-6)
    assert torch.all(now <= torch.maximum(old, new) + 1e-6)
    assert now.sum(-1).abs().max() < 1e-5


def test_the_fixed_point_is_the_fast_temperature_not_its_cube():
    state = ControlState(1, 3, 4)
    error = torch.tensor([[0.6, 0.0, 0.0]])
    for now in range(1, 2001):
        move_temperature(state, error, CONFIG, KnobFactors(), now)
    fast = state.temperature_fast
    assert fast.abs().max() > 0.05
    torch.testing.assert_close(effective(state, CONFIG, 4.0), fast, atol=1e-5, rtol=0)


def test_blocks_of_time_hold_plain_means():
    state, knob = ControlState(2, 4, 4), MetaKnob()
    seen, rates = [], []
    generator = torch.Generator().manual_seed(0)
    for now in range(1, 2 * BLOCK + 4):
        knob.set(now / 100 - 0.25)
        move_temperature(state, torch.rand(2, 4, generator=generator), CONFIG, knob.factors, now)
        seen.append(state.temperature_fast.clone())
        rates.append(knob.factors.rate_scale)
    for block in range(3):
        ticks = slice(block * BLOCK, (block + 1) * BLOCK)
        torch.testing.assert_close(state.fast_blocks[block], torch.stack(seen[ticks]).mean(dim=0))
        torch.testing.assert_close(state.block_rates[block], torch.tensor(rates[ticks]).mean())


@many
@given(states(), st.floats(1, 10))
def test_the_effective_temperature_respects_the_ratio(state, rho):
    tau = effective_temperature(10 * state[0], state[1], CONFIG, rho)
    assert (tau.amax(-1) - tau.amin(-1)).exp().max() <= rho * (1 + 1e-5)
