"""Turn goals on and off in a steered model.

    an attached expert     its goals are the prior of its domain gate, in nats of log-odds: strength times worth
    a model's own experts  g = beta s from links and likeness of text, beta by a budget of output KL

Several goals average by their weights and never add up: the worth of a set of goals for an expert is
sum_g w_g (w_g linked_g) / sum_g w_g. Off is bit-identical to a model without goals.

Shape suffixes: L MoE layers, N experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from chronomoe.errors import ConfigError
from chronomoe.goals.field import biased, centred, find_beta, output_kl
from chronomoe.goals.settings import GoalSettings
from chronomoe.hosts.capture import gate_inputs, measure_routing
from chronomoe.hosts.protocol import SteeredModel
from chronomoe.routing.losses import direction_similarity


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One goal that is on."""

    text: str
    weight: float = 1.0
    """In (0, 1]."""
    experts: tuple[str, ...] = ()
    """Ids or uids of attached experts."""
    slots: tuple[tuple[int | None, int], ...] = ()
    """(MoE layer, expert) of the model's own; None for that expert of every layer."""
    tokens: tuple[int, ...] = ()
    """The text as the model reads it, for likeness."""


@dataclass(frozen=True, kw_only=True)
class GoalEffect:
    """What turning goals on did."""

    goals: list[str]
    idle: list[str] = field(default_factory=list)
    """Goals linked to nothing in this model."""
    priors: dict[str, float] = field(default_factory=dict)
    """Attached expert -> nats."""
    missing: list[str] = field(default_factory=list)
    """Linked experts that are not in the model, not active or closed: skipped."""
    beta: float = 0.0
    kl: float | None = None
    """Measured on the calibration text; None where there was none."""
    budget: float | None = None
    linked: list[list[int]] = field(default_factory=list)
    """[layer, expert] of the model's own that goals are linked to or like."""
    share_before: list[list[float]] = field(default_factory=list)
    share_after: list[list[float]] = field(default_factory=list)
    """By layer, the share of the assignments each expert has on the calibration text."""
    protected: list[float] = field(default_factory=list)
    """By layer, the share of tokens whose experts the field cannot change, their inputs being equal."""

    @property
    def within_budget(self) -> bool:
        """False where even the largest bias stays below the budget by more than a twentieth."""
        return self.budget is None or self.kl is None or self.kl >= 0.95 * self.budget

    def to_json(self) -> dict[str, Any]:
        """For the log: the event ``goal_bias``."""
        return {
            "event": "goal_bias",
            "goals": self.goals,
            "experts": [*self.priors, *(f"{layer}.{expert}" for layer, expert in self.linked)],
            "idle": self.idle,
            "missing": self.missing,
            "priors": self.priors,
            "beta": round(self.beta, 6),
            "kl": self.kl,
            "kl_budget": self.budget,
            "share_before": [[round(value, 5) for value in row] for row in self.share_before],
            "share_after": [[round(value, 5) for value in row] for row in self.share_after],
            "protected_fraction": [round(value, 5) for value in self.protected],
        }


@torch.no_grad()
def turn_off(model: Any) -> None:
    """No goal: the field is zero, no gate has a prior, and nothing learned of goals is added."""
    if getattr(model, "steering", None) is not None:
        model.steering.goal_bias.zero_()
        if model.steering.conditioning is not None:
            model.steering.conditioning.embedding = None
    for expert in _attached(model):
        expert.gate.prior.zero_()


@torch.no_grad()
def turn_on(
    model: Any,
    goals: Sequence[Goal],
    settings: GoalSettings = GoalSettings(),  # noqa: B008 (frozen)
    windows: Tensor | None = None,
) -> GoalEffect:
    """Turn on ``goals``, and no others; ``windows`` (n, S) are text to find beta on and to measure with.

    Links to what is not there are skipped and listed in the effect. Raises :class:`ConfigError`, and what was on stays
    on, for layers that do not exist, a budget without text, or likeness in a model whose experts' inputs are unknown.
    """
    if getattr(model, "steering", None) is None:
        raise ConfigError("this model has no experts of its own and none attached: goals have nothing to act on.")
    acting, effect = _acting(model, goals, settings)
    if settings.beta is None and windows is None and (settings.likeness or any(goal.slots for goal in acting)):
        raise ConfigError("a budget of KL needs text to measure it on; give some, or the size of the bias (beta).")
    turn_off(model)
    if not acting:
        return effect
    was_training = model.training
    model.eval()
    try:
        effect = replace(effect, priors=_priors(model, acting, settings.strength))
        s_LN = _preferences(model, acting, settings)
        return _bias(model, s_LN, settings, windows, effect) if bool(s_LN.any()) else effect
    finally:
        model.train(was_training)
        if hasattr(model.model, "reset_segments"):
            model.model.reset_segments()


def _attached(model: Any) -> list[Any]:
    return list(getattr(model, "subbrains", {}).values())


def _acting(model: SteeredModel, goals: Sequence[Goal], settings: GoalSettings) -> tuple[list[Goal], GoalEffect]:
    """The goals that have something to act on here, and an effect that lists the others and missing links."""
    available_LN = model.steering.available
    layers = len(available_LN)
    for layer in settings.layers or ():
        if not 0 <= layer < layers:
            raise ConfigError(f"goals are to act in MoE layer {layer}; there are layers 0 to {layers - 1}.")
    if settings.likeness and goals and not bool(model.steering.direction.any()):
        raise ConfigError(
            "it is not known what the experts of this model usually receive, so nothing can be like a goal's text; "
            "link the goal to experts, or train the model with its control layer."
        )
    here = {name for one in _attached(model) if one.active for name in (one.expert_id, one.uid)}
    acting: list[Goal] = []
    effect = GoalEffect(goals=[])
    for goal in goals:
        if settings.likeness and not goal.tokens:
            raise ConfigError(f"goal {goal.text!r} has no tokens to compare with.")
        slots = tuple(slot for slot in goal.slots if _usable(slot, available_LN))
        gone = [name for name in goal.experts if name not in here]
        gone += [
            "{}.{}".format("*" if slot[0] is None else slot[0], slot[1]) for slot in goal.slots if slot not in slots
        ]
        effect.missing.extend(name for name in gone if name not in effect.missing)
        if settings.likeness or slots or not here.isdisjoint(goal.experts):
            acting.append(replace(goal, slots=slots))
            effect.goals.append(goal.text)
        else:
            effect.idle.append(goal.text)
    return acting, effect


def _usable(slot: tuple[int | None, int], available_LN: Tensor) -> bool:
    layers, experts = available_LN.shape
    layer, expert = slot
    if not (0 <= expert < experts and (layer is None or 0 <= layer < layers)):
        return False
    return bool(available_LN[slice(None) if layer is None else layer, expert].any())


def _priors(model: Any, goals: Sequence[Goal], strength: float) -> dict[str, float]:
    total = sum(goal.weight for goal in goals)
    priors = {}
    for expert in _attached(model):
        worth = sum(goal.weight**2 for goal in goals if {expert.expert_id, expert.uid} & set(goal.experts))
        if worth and expert.active:
            priors[expert.expert_id] = strength * worth / total
            expert.gate.prior.fill_(strength * worth / total)
    return priors


def _preferences(model: SteeredModel, goals: Sequence[Goal], settings: GoalSettings) -> Tensor:
    """s (L, N)."""
    available_LN = model.steering.available
    affinity_LN = torch.zeros(available_LN.shape, device=available_LN.device)
    for goal in goals:
        links_LN = torch.zeros_like(affinity_LN)
        for place, expert in goal.slots:
            links_LN[slice(None) if place is None else place, expert] = 1
        like_LN = _likeness(model, goal) if settings.likeness else torch.zeros_like(links_LN)
        affinity_LN += goal.weight * ((1 - settings.likeness) * links_LN + settings.likeness * like_LN)
    return centred(affinity_LN, available_LN, settings.layers)


def _likeness(model: SteeredModel, goal: Goal) -> Tensor:
    """cos of the goal's text and what each expert usually receives, mean over its tokens, (L, N)."""
    steering = model.steering
    layers = range(len(steering.direction))
    inputs = gate_inputs(model, layers, torch.tensor([goal.tokens], device=steering.direction.device))
    prototypes_LMD = torch.cat([steering.direction, steering.input_mean.unsqueeze(1)], dim=1)
    along_LM = (prototypes_LMD @ steering.input_mean.unsqueeze(-1)).squeeze(-1)
    return torch.stack(
        [direction_similarity(inputs[layer][0], prototypes_LMD[layer], along_LM[layer]).mean(dim=0) for layer in layers]
    )


def _bias(
    model: SteeredModel, s_LN: Tensor, settings: GoalSettings, windows: Tensor | None, effect: GoalEffect
) -> GoalEffect:
    steering = model.steering
    if windows is None:
        beta = settings.beta or 0.0
        steering.goal_bias.copy_(beta * s_LN)
        return replace(effect, beta=beta, linked=_preferred(s_LN))
    divergence = output_kl(model, windows)
    if settings.beta is None:
        beta, measured = find_beta(lambda size: divergence(size * s_LN), settings.kl)
    else:
        beta, measured = settings.beta, divergence(settings.beta * s_LN)
    reach_L = beta * (s_LN.amax(dim=-1) - s_LN.amin(dim=-1))
    with biased(steering, torch.zeros_like(s_LN)):
        before = measure_routing(model, windows, reach_L)
    steering.goal_bias.copy_(beta * s_LN)
    after = measure_routing(model, windows)
    return replace(
        effect,
        beta=beta,
        kl=measured,
        budget=None if settings.beta is not None else settings.kl,
        linked=_preferred(s_LN),
        share_before=before.share.tolist(),
        share_after=after.share.tolist(),
        protected=before.protected.tolist(),
    )


def _preferred(s_LN: Tensor) -> list[list[int]]:
    rows: list[list[int]] = (s_LN > 0).nonzero().tolist()
    return rows
