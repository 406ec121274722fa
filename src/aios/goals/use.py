"""Goals of a workspace at work in one of its brains: find them, turn them on, say what that did."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aios.brains.brain import Brain
from aios.brains.loaded import LoadedBrain, encode
from aios.goals.memory import read_memory
from aios.settings.goals import GoalFlags
from aios.store.goals import Goal as StoredGoal
from aios.store.goals import Goals
from aios.store.slots import read_slot
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import training_windows
from chronomoe.errors import ConfigError
from chronomoe.goals.conditioning import condition, load_conditioning
from chronomoe.goals.settings import CAP
from chronomoe.goals.steer import Goal, GoalEffect, turn_on

_WINDOWS, _LENGTH = 32, 128


def turn_on_goals(loaded: LoadedBrain, flags: GoalFlags, measured: GoalEffect | None = None) -> GoalEffect:
    """Turn the goals that the flags name on, and all others off.

    ``measured`` is what they did at another strength: nothing of the brain's own experts is measured again. Raises
    :class:`ConfigError` for goals that do not exist, or settings that cannot be.
    """
    if flags.goals_remembered:
        flags = _as_remembered(loaded.brain, flags)
    return turn_on_these(loaded, find_goals(loaded.brain, loaded.tokenizer, flags), flags, measured)


def turn_on_these(
    loaded: LoadedBrain, goals: list[Goal], flags: GoalFlags, measured: GoalEffect | None = None
) -> GoalEffect:
    """Turn on goals that were found already, as the flags say. Raises as :func:`turn_on_goals`."""
    settings, model, brain = flags.effect, loaded.model, loaded.brain
    if measured is not None:
        settings = settings.replace(beta=measured.beta)
    if flags.goals_learned and goals and not load_conditioning(model, brain.weights):
        raise ConfigError(f"{brain.path.name} was never taught a goal; `aios goals teach` does that.")
    needs_text = measured is None and (flags.goal_likeness > 0 or any(goal.slots for goal in goals))
    windows = _calibration_text(loaded, flags) if needs_text else None
    effect = turn_on(model, goals, settings, windows)
    if measured is not None:
        effect = dataclasses.replace(measured, priors=effect.priors, missing=effect.missing)
    ids = Goals(brain.root).expert_ids()
    effect = dataclasses.replace(effect, missing=[ids.get(uid, uid) for uid in effect.missing])
    if flags.goals_learned:
        condition(model, goals)
    return effect


def find_goals(brain: Brain, tokenizer: Any, flags: GoalFlags) -> list[Goal]:
    """The goals that the flags name, with their links into this brain; :class:`ConfigError` for one there is not."""
    stored = _stored(brain.root, flags)
    goals = [one.goal for one in read_memory(brain).goals] if flags.goals_remembered else []
    if flags.goals_remembered and not goals:
        raise ConfigError(f"{brain.path.name} was not trained under goals; name one with --goal.")
    for one in stored:
        slots = [read_slot(link) for link in one.experts if ":" in link]
        here = tuple((slot.layer, slot.expert) for slot in slots if slot.brain == brain.name)
        experts = tuple(link for link in one.experts if ":" not in link)
        goals.append(Goal(text=one.text, weight=one.weight, experts=experts, slots=here))
    goals = list({goal.text: goal for goal in goals}.values())
    return [dataclasses.replace(goal, tokens=tuple(encode(tokenizer, goal.text))) for goal in goals]


def describe_effect(effect: GoalEffect) -> list[str]:
    """What turning goals on did, a line for each thing, for people."""
    lines = [f"Goals: {'; '.join(effect.goals) or 'none, nothing changes'}"]
    lines += [f"  linked to no expert of this brain: {'; '.join(effect.idle)}"] if effect.idle else []
    lines += [f"  expert {name}: {nats:+.2f} nats for its gate" for name, nats in effect.priors.items()]
    lines += [f"  expert {name} is not in this brain, or not active: skipped" for name in effect.missing]
    if effect.linked:
        known = f", output KL {effect.kl:.4f} nats a token" if effect.kl is not None else ""
        lines.append(f"  the brain's own experts: bias {effect.beta:.3f}{known}")
        if effect.share_before:
            moved = [
                f"{layer}.{expert} {effect.share_before[layer][expert]:.1%} to {effect.share_after[layer][expert]:.1%}"
                for layer, expert in effect.linked[:8]
            ]
            lines.append(f"  share of tokens: {', '.join(moved)}{', ...' if len(effect.linked) > 8 else ''}")
        if not effect.within_budget:
            why = "out of reach: the bias is at its largest" if effect.beta == CAP else "less than one choice changes"
            lines.append(f"  the budget of {effect.budget:g} is {why}")
    return lines


def _as_remembered(brain: Brain, flags: GoalFlags) -> GoalFlags:
    """What the flags leave at its default is as it was in training."""
    known = read_memory(brain).settings
    same = [one.name for one in dataclasses.fields(GoalFlags) if getattr(flags, one.name) == one.default]
    return dataclasses.replace(flags, **{name: getattr(known, name) for name in same})


def _stored(root: Path, flags: GoalFlags) -> list[StoredGoal]:
    known = Goals(root).all(active_only=False)
    found = [one for one in known if one.active] if flags.goals_active else []
    for word in flags.goal:
        word = word.strip()
        named = [one for one in known if word == str(one.id)] or [one for one in known if word == one.text]
        if not named:
            raise ConfigError(
                f"there is no goal {word!r}; `aios goals list --all` shows them, `aios goals add` adds one."
            )
        found += [one for one in named if one not in found]
    return found


def _calibration_text(loaded: LoadedBrain, flags: GoalFlags) -> Tensor | None:
    """Windows (n, S) of the text a budget is measured on; None where there is none and beta is given."""
    length, device = min(_LENGTH, loaded.context_length), loaded.model.device
    if flags.goal_text is not None:
        if not flags.goal_text.is_file():
            raise ConfigError(f"there is no text {flags.goal_text}.")
        ids = loaded.tokens(flags.goal_text.read_text(encoding="utf-8", errors="replace"))[: _WINDOWS * length]
        if len(ids) < length:
            raise ConfigError(f"{flags.goal_text} has {len(ids)} tokens; to measure on it takes {length} or more.")
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length).to(device)
    place = loaded.brain.data
    if place is None:
        if flags.goal_beta is not None:
            return None
        raise ConfigError(
            "the data this brain was trained on is gone, so a goal's budget cannot be measured; give --goal-text, or "
            "--goal-beta."
        )
    store = TokenStore.open(place)
    each = max(1, _WINDOWS // len(store.info.domains))
    return torch.cat(list(training_windows(store, length, each, 0).values())).to(device)
