"""Goals of a workspace at work in one of its brains: find them, turn them on, say what that did."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aios.brains.bundle import model_folder
from aios.brains.shelf import brain_name
from aios.goal_text import goal_text, goal_weight
from aios.settings.goals import GoalFlags, TrainingGoals
from aios.store.goals import Goals
from aios.store.slots import read_slot
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.goals.conditioning import condition, load_conditioning
from chronomoe.goals.settings import CAP
from chronomoe.goals.steer import Goal, GoalEffect, turn_off, turn_on
from chronomoe.hosts.capture import RoutingCounts, capture_choices, count_routing, kl
from chronomoe.storage import write_json

REMEMBERED = "goals.json"
_WINDOWS, _LENGTH = 32, 128


def turn_on_goals(
    root: Path, bundle: Path, model: Any, tokenizer: Any, flags: GoalFlags, measured: GoalEffect | None = None
) -> GoalEffect:
    """Turn the goals asked for on in the model of ``bundle``, and all others off.

    ``measured`` is what they did at another strength: nothing of the brain's own experts is measured again. Raises
    :class:`ConfigError` for goals there are none of, or settings that cannot be.
    """
    if flags.goals_remembered:
        flags = _as_remembered(bundle, flags)
    return _turn_on(root, bundle, model, tokenizer, asked_goals(root, bundle, tokenizer, flags), flags, measured)


def _turn_on(
    root: Path,
    bundle: Path,
    model: Any,
    tokenizer: Any,
    goals: list[Goal],
    flags: GoalFlags,
    measured: GoalEffect | None = None,
) -> GoalEffect:
    settings = flags.effect
    if measured is not None:
        settings = dataclasses.replace(settings, beta=measured.beta)
    if flags.goals_learned and goals and not load_conditioning(model, model_folder(bundle)):
        raise ConfigError(f"{bundle.name} was never taught a goal; `aios goals teach` does that.")
    needs_text = measured is None and (flags.goal_likeness > 0 or any(goal.slots for goal in goals))
    windows = calibration_text(root, bundle, model, tokenizer, flags) if needs_text else None
    effect = turn_on(model, goals, settings, windows)
    if measured is not None:
        effect = dataclasses.replace(measured, priors=effect.priors, missing=effect.missing)
    ids = Goals(root).expert_ids()
    effect = dataclasses.replace(effect, missing=[ids.get(uid, uid) for uid in effect.missing])
    if flags.goals_learned:
        condition(model, goals)
    return effect


def _as_remembered(bundle: Path, flags: GoalFlags) -> GoalFlags:
    """What the flags leave at its default is as it was in training."""
    known = remembered_flags(bundle)
    same = [one.name for one in dataclasses.fields(GoalFlags) if getattr(flags, one.name) == one.default]
    return dataclasses.replace(flags, **{name: getattr(known, name) for name in same})


def asked_goals(root: Path, bundle: Path, tokenizer: Any, flags: GoalFlags) -> list[Goal]:
    """The goals asked for, with their links into this brain; :class:`ConfigError` for one there is not."""
    stored = _stored(root, flags)
    goals = [] if not flags.goals_remembered else remembered(bundle)
    if flags.goals_remembered and not goals:
        raise ConfigError(f"{bundle.name} was not trained under goals; name one with --goal.")
    for one in stored:
        slots = [read_slot(link) for link in one.experts if ":" in link]
        here = tuple((slot.layer, slot.expert) for slot in slots if slot.brain == brain_name(bundle))
        experts = tuple(link for link in one.experts if ":" not in link)
        goals.append(Goal(text=one.text, weight=one.weight, experts=experts, slots=here))
    goals = list({goal.text: goal for goal in goals}.values())
    return [dataclasses.replace(goal, tokens=tuple(_ids(tokenizer, goal.text))) for goal in goals]


def _stored(root: Path, flags: GoalFlags) -> list[Any]:
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


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def calibration_text(root: Path, bundle: Path, model: Any, tokenizer: Any, flags: GoalFlags) -> Tensor | None:
    """Windows (n, S) of the text a budget is measured on; None where there is none and beta is given."""
    from aios.brains.bundle import data_of
    from chronomoe.data.token_store import TokenStore
    from chronomoe.data.windows import training_windows

    length = min(_LENGTH, model.config.max_position_embeddings)
    if flags.goal_text is not None:
        if not flags.goal_text.is_file():
            raise ConfigError(f"there is no text {flags.goal_text}.")
        ids = _ids(tokenizer, flags.goal_text.read_text(encoding="utf-8", errors="replace"))[: _WINDOWS * length]
        if len(ids) < length:
            raise ConfigError(f"{flags.goal_text} has {len(ids)} tokens; to measure on it takes {length} or more.")
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length).to(model.device)
    place = data_of(root, bundle)
    if place is None:
        if flags.goal_beta is not None:
            return None
        raise ConfigError(
            "the data this brain was trained on is gone, so a goal's budget cannot be measured; give --goal-text, or "
            "--goal-beta."
        )
    store = TokenStore.open(place)
    each = max(1, _WINDOWS // len(store.info.domains))
    return torch.cat(list(training_windows(store, length, each, 0).values())).to(model.device)


def words(effect: GoalEffect) -> list[str]:
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


# -- what a bundle remembers -------------------------------------------------------------------------------------------


def goals_for_training(
    root: Path, bundle: Path, model: Any, tokenizer: Any, flags: TrainingGoals
) -> tuple[Callable[[], dict[str, Any] | None], str]:
    """What a trainer calls to turn the goals on, and its ``goals_key``; the bundle remembers them.

    Raises :class:`ConfigError` for goals there are none of, or that have nothing to act on.
    """
    goals, note = goals_to_train_under(root, bundle, tokenizer, flags)

    def steer() -> dict[str, Any] | None:
        # What experts usually receive is not known before training.
        known = not flags.goal_likeness or bool(model.steering.direction.any())
        event = _turn_on(root, bundle, model, tokenizer, goals, flags).to_json() if known else None
        write_json(bundle / REMEMBERED, note)  # only now: what cannot be turned on must not be in the way of the next
        return event

    return steer, json.dumps(note, sort_keys=True)


def goals_to_train_under(
    root: Path, bundle: Path, tokenizer: Any, flags: TrainingGoals
) -> tuple[list[Goal], dict[str, Any]]:
    """The goals asked for, and the note of them that the bundle keeps. Raises as :func:`goals_for_training`."""
    goals = [one for one in asked_goals(root, bundle, tokenizer, flags) if one.slots or flags.goal_likeness]
    if not goals:
        slot = f"{brain_name(bundle)}:LAYER.EXPERT"
        raise ConfigError(
            "none of these goals is linked to an expert of this brain's own, so there is nothing to train under; link "
            f"one with `aios goals link-expert ID {slot}` (a brain has experts once it is trained: go on with --resume "
            "then), or give --goal-likeness."
        )
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(flags).items()
        if name.startswith("goal_")
    }
    if flags.goal_text is not None:
        settings["goal_text"] = str(flags.goal_text.resolve())
    kept = [dataclasses.asdict(dataclasses.replace(goal, tokens=())) for goal in goals]
    return goals, {"goals": kept, "settings": settings}


def remembered(bundle: Path) -> list[Goal]:
    """The goals a bundle was trained under; :class:`CheckpointError` when the file is damaged."""
    return _memory(bundle)[0]


def remembered_flags(bundle: Path) -> TrainingGoals:
    """How they were turned on; no goal at all where none is remembered."""
    goals, settings = _memory(bundle)
    return TrainingGoals(goals_remembered=bool(goals), **settings)


def _memory(bundle: Path) -> tuple[list[Goal], dict[str, Any]]:
    file = bundle / REMEMBERED
    if not file.exists():
        return [], {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        goals = [
            Goal(
                text=goal_text(one["text"]),
                weight=goal_weight(one["weight"]),
                experts=tuple(str(name) for name in _listed(one["experts"])),
                slots=tuple((None if layer is None else int(layer), int(expert)) for layer, expert in one["slots"]),
            )
            for one in found["goals"]
        ]
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found["settings"].items()
        }
        if settings.get("goal_text") is not None:
            settings["goal_text"] = Path(settings["goal_text"])
        TrainingGoals(goals_remembered=True, **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); put a copy back, or remove it to forget goals.") from error
    return goals, settings


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


# -- explain -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def explain(
    root: Path,
    bundle: Path,
    model: Any,
    tokenizer: Any,
    flags: GoalFlags,
    text: str,
    *,
    each_token: bool = False,
    segment: int | None = None,
    measured: GoalEffect | None = None,
) -> tuple[GoalEffect, dict[str, Any]]:
    """Where the tokens of ``text`` go with the goals ``off`` and ``on``: shares by layer and expert, and open gates.

    ``each_token`` adds what was chosen for each, in ``segment`` or in the last it ran. ``measured`` as in
    :func:`turn_on_goals`.
    """
    if getattr(model, "steering", None) is None:
        raise ConfigError(f"{bundle.name} has no experts of its own and none attached: there is nothing to explain.")
    ids = [tokenizer.eos_token_id, *_ids(tokenizer, text)][: model.config.max_position_embeddings]
    if len(ids) < 2:
        raise ConfigError("the text is empty; give some.")
    row = torch.tensor([ids], device=model.device)

    def look() -> tuple[dict[str, Any], Tensor]:
        with count_routing(model) as counts:
            seen = capture_choices(model, row, segment)
        found = shares(counts)
        if each_token:
            found |= {
                "chosen": seen.chosen.tolist(),
                "weights": seen.weights.tolist(),
                "open_at": {name: open_T.tolist() for name, open_T in seen.open_at.items()},
                "segments": None if seen.segments is None else seen.segments.tolist(),
            }
        return found, seen.logits

    turn_off(model)
    off, logits_off = look()
    effect = turn_on_goals(root, bundle, model, tokenizer, flags, measured)
    on, logits_on = look()
    told = {**effect.to_json(), "tokens": len(ids), "off": off, "on": on}
    told["text_kl"] = float(kl(logits_off, logits_on).mean())
    if each_token:
        told["pieces"] = ["", *(tokenizer.decode([token]) for token in ids[1:])]
    return effect, told


def shares(counts: RoutingCounts) -> dict[str, Any]:
    """JSON-ready: the ``share`` of each layer's experts, and of the tokens each attached expert is ``open`` at."""
    return {"share": counts.share.tolist(), "open": counts.open_share}
