"""Where the tokens of a text go with goals off and on: `aios goals explain`, the page of routing."""

from typing import Any

import torch
from torch import Tensor

from aios.brains.loaded import LoadedBrain
from aios.goals.use import turn_on_goals
from aios.settings.goals import GoalFlags
from chronomoe.errors import ConfigError
from chronomoe.goals.steer import GoalEffect, turn_off
from chronomoe.hosts.capture import RoutingCounts, capture_choices, count_routing, kl


@torch.no_grad()
def explain(
    loaded: LoadedBrain,
    flags: GoalFlags,
    text: str,
    *,
    each_token: bool = False,
    segment: int | None = None,
    measured: GoalEffect | None = None,
) -> tuple[GoalEffect, dict[str, Any]]:
    """Where the tokens of ``text`` go with the goals ``off`` and ``on``: shares by layer and expert, and open gates.

    ``each_token`` adds what was chosen for each, in ``segment`` or in the last it ran. ``measured`` as in
    :func:`aios.goals.use.turn_on_goals`. Raises :class:`ConfigError` for a brain without experts or an empty text.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if getattr(model, "steering", None) is None:
        raise ConfigError(
            f"{loaded.brain.path.name} has no experts of its own and none attached: there is nothing to explain."
        )
    ids = [tokenizer.eos_token_id, *loaded.require_tokens(text)][: loaded.context_length]
    row = torch.tensor([ids], device=model.device)

    def measure() -> tuple[dict[str, Any], Tensor]:
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
    off, logits_off = measure()
    effect = turn_on_goals(loaded, flags, measured)
    on, logits_on = measure()
    report = {**effect.to_json(), "tokens": len(ids), "off": off, "on": on}
    report["text_kl"] = float(kl(logits_off, logits_on).mean())
    if each_token:
        report["pieces"] = ["", *(tokenizer.decode([token]) for token in ids[1:])]
    return effect, report


def shares(counts: RoutingCounts) -> dict[str, Any]:
    """JSON-ready: the ``share`` of each layer's experts, and of the tokens each attached expert is ``open`` at."""
    return {"share": counts.share.tolist(), "open": counts.open_share}
