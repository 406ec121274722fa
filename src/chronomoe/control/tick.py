"""One tick of the control layer: what one step's routing does to the state, and what the state does to the routers.

    window of the routers -> load error -> pressure b
                          -> direction of inputs -> coherence R
                          -> gradient signal -> health r
                          -> fast temperature -> structural temperature -> temperature T

Each quantity has one function, which moves the state in place.

Shape suffixes: L MoE layers, N experts.
"""

import math

from torch import Tensor, nn

from chronomoe.control import judge, landscape, pressure, temperature
from chronomoe.control.coherence import expert_coherence, update_direction
from chronomoe.control.config import ControlConfig
from chronomoe.control.health import health, update_signal
from chronomoe.control.landscape import BLOCK, BLOCKS
from chronomoe.control.state import ControlState
from chronomoe.knob import KnobFactors
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.routing.steering import Steering

SPREAD_FLOOR = 0.01
"""Least spread of the logits that gains are multiples of: a new router has almost none."""
SPREAD_RATE = 0.1
LOAD_RATE, SLOW_LOAD_RATE, MEAN_LOAD_RATE = 0.5, 0.2, 0.02
MEAN_PRESSURE_RATE = 0.1
"""Weight of the newest value in the averages of spread, loads (proportional term, alarm, reports) and pressure."""
RECOVERY_DECAY = 0.98
"""What is left of an expert's recovery after a tick: half after 34."""


def advance(
    state: ControlState, window: RoutingWindow, config: ControlConfig, factors: KnobFactors, *, dense: bool
) -> None:
    """Count one tick and move pressure, coherence, health and temperature by it.

    ``dense``: every token uses every expert.
    """
    state.ticks += 1
    now = int(state.ticks)
    target_LN = pressure.equal_target(window.available)
    error_LN = pressure.load_error(window.load_without_goals, target_LN)  # pressure must not fight a goal
    move_pressure(state, window, error_LN, target_LN, config, factors, now)
    move_coherence(state, window, config, dense=dense)
    move_health(state, window, config)
    move_temperature(state, error_LN, config, factors, now)


def move_pressure(
    state: ControlState,
    window: RoutingWindow,
    error_LN: Tensor,
    target_LN: Tensor,
    config: ControlConfig,
    factors: KnobFactors,
    now: int,
) -> None:
    """Loads, spread, live and mean pressure after tick number ``now``; see :mod:`chronomoe.control.pressure`."""
    first, load_LN = now == 1, window.load_without_goals
    state.spread.lerp_(window.logit_std / window.tokens, 1.0 if first else SPREAD_RATE)
    state.mean_load.lerp_(window.load, max(MEAN_LOAD_RATE, 1 / now))
    state.smooth_load.lerp_(load_LN, 1.0 if first else LOAD_RATE)
    state.slow_load.lerp_(load_LN, 1.0 if first else SLOW_LOAD_RATE)
    if config.pressure == "sign":
        step = config.sign_step * factors.pressure_scale
        state.live_pressure.copy_(pressure.sign_update(state.live_pressure, error_LN, step))
    elif config.pressure == "pi":
        # Calm at rest, for pressure that chases the noise of single batches disturbs what is learned; quick early
        # and when an error persists.
        early = math.exp(-(now - 1) / config.early_ticks)
        alarm_L1 = pressure.alarm(pressure.load_error(state.slow_load, target_LN), config.alarm)
        spread_L1 = state.spread.clamp(min=SPREAD_FLOOR).unsqueeze(-1)
        scale_L1 = factors.pressure_scale * spread_L1
        calm = config.gamma + (config.gamma_early - config.gamma) * early
        gamma_L1 = calm + (config.gamma_alarm - calm) * alarm_L1
        integral_LN, b_LN = pressure.pi_update(
            state.integral,
            error_LN,
            pressure.load_error(state.smooth_load, target_LN),
            gamma_L1 * scale_L1,
            config.gamma_p * scale_L1,
            None if config.bound is None else config.bound * spread_L1,
            leak=config.leak,
            centred=config.centred,
        )
        state.integral.copy_(integral_LN)
        state.live_pressure.copy_(b_LN)
    state.mean_pressure.lerp_(state.live_pressure, max(MEAN_PRESSURE_RATE, 1 / now))


def move_coherence(state: ControlState, window: RoutingWindow, config: ControlConfig, *, dense: bool) -> None:
    """Direction and coherence of every expert; see :mod:`chronomoe.control.coherence`."""
    if dense:
        state.coherence.fill_(1)  # every expert gets everything: nothing could be steadier
        return
    memory = config.coherence_memory
    update_direction(state.direction, state.forgotten, window.centred_direction, memory)
    state.coherence.copy_(expert_coherence(state.direction, state.forgotten, memory))


def move_health(state: ControlState, window: RoutingWindow, config: ControlConfig) -> None:
    """Gradient signal and health of every expert; see :mod:`chronomoe.control.health`."""
    update_signal(
        state.contrast,
        state.gradient_size,
        window.gradient,
        window.absolute_gradient,
        window.assignments,
    )
    state.health.copy_(health(state.contrast, state.gradient_size, config.health_scale))
    state.recovering.mul_(RECOVERY_DECAY)
    judge.refresh(state, window.available, config)


def move_temperature(
    state: ControlState, error_LN: Tensor, config: ControlConfig, factors: KnobFactors, now: int
) -> None:
    """Fast and structural temperature after tick number ``now``; see :mod:`chronomoe.control.temperature`."""
    rate = factors.rate_scale
    fast = temperature.fast_temperature(error_LN, state.recovering, state.coherence, state.health, config)
    state.temperature_fast.copy_(fast)
    state.structural_T_local.lerp_(fast, min(1.0, rate * config.eta_structural_T_local))
    state.structural_T_global.lerp_(fast.mean(dim=0), min(1.0, rate * config.eta_structural_T_global))
    block, place = divmod(now - 1, BLOCK)
    weight = 1 / (place + 1)  # the plain mean of the block so far
    state.block_rates[block % BLOCKS] += (rate - state.block_rates[block % BLOCKS]) * weight
    state.fast_blocks[block % BLOCKS].lerp_(fast, weight)


def effective_temperature(state: ControlState, config: ControlConfig, rho: float) -> Tensor:
    """(L, N) log temperature that the routers are to use."""
    return temperature.effective_temperature(state.temperature_fast, state.structural_T_local, config, rho)


def valley_weight(state: ControlState, config: ControlConfig) -> Tensor:
    """(L, N) how much each expert is an unhealthy valley, in [0, 1]."""
    return landscape.valley_weight(state.structural_T_local, state.health, config.suspect_below)


def steer(
    state: ControlState, steering: Steering, window: RoutingWindow, config: ControlConfig, factors: KnobFactors
) -> None:
    """Write the state into the fields of the routers, those of mechanisms that are on."""
    if config.pressure != "off":
        steering.pressure.copy_(state.live_pressure)
    if config.temperature:
        steering.log_temperature.copy_(effective_temperature(state, config, steering.config.rho))
    if config.initial_noise > 0:
        # T0 matters only against exploration noise: a common factor changes no order.
        steering.base_temperature.fill_(factors.temp_scale)
        # Noise in units of the logits' spread, as pressure: at the start logits are all but equal.
        steering.exploration.copy_(config.initial_noise * max(0.0, factors.kappa) * state.spread.mean())
    steering.direction.copy_(nn.functional.normalize(state.direction, dim=-1))
    steering.input_mean.copy_(window.input_sum / window.tokens.unsqueeze(-1))
    steering.valley_weight.copy_(valley_weight(state, config))


def release(state: ControlState, steering: Steering, config: ControlConfig) -> None:
    """Undo the fields of mechanisms that are off: what they left would steer on for ever."""
    if config.pressure == "off":
        for buffer in (state.integral, state.live_pressure, state.mean_pressure, steering.pressure):
            buffer.zero_()
    if not config.temperature:
        steering.log_temperature.zero_()
    if config.initial_noise == 0:
        steering.base_temperature.fill_(1)
        steering.exploration.zero_()
    if not config.health:
        steering.available.logical_or_(state.masked)
        for buffer in (state.masked, state.evidence, state.fruitless):
            buffer.zero_()
