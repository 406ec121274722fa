"""Attached experts at work: how much each was used, and what a gate makes of a text."""

from contextlib import suppress
from typing import Any

import torch

from aios.brains.loaded import LoadedBrain
from aios.store.experts import Registry
from chronomoe.errors import ChronoMoEError, ConfigError
from chronomoe.hosts.capture import RoutingCounts, gate_inputs


def record_use(loaded: LoadedBrain, counts: RoutingCounts) -> list[str]:
    """Add to the registry at how many tokens each attached expert was open; returns a line for each.

    Best effort: what was generated is not lost because the registry cannot be written.
    """
    lines = []
    for expert in loaded.attached:
        opened, seen = counts.tokens_open[expert.expert_id], counts.tokens_seen[expert.expert_id]
        lines.append(f"{expert.expert_id}: open at {opened} of {seen} tokens")
        if opened:
            with suppress(ChronoMoEError, OSError):
                registry = Registry(loaded.brain.root)
                for entry in registry.entries():
                    if entry.expert_uid == expert.uid:
                        registry.record_use(entry.expert_id, opened, expert.mean_mixing)
    return lines


def gate_along(loaded: LoadedBrain, expert_id: str, text: str) -> dict[str, Any]:
    """What an attached expert's gate makes of a text: its running log-odds at each token, and where it opens."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if not loaded.attached:
        name = loaded.brain.name
        raise ConfigError(f"no expert is attached to {name}; `aios experts attach {expert_id} --brain {name}` does it.")
    gate = model.subbrains.by_id(expert_id).gate
    ids = loaded.require_tokens(text)
    room = loaded.context_length - 1
    tokens = torch.tensor([[tokenizer.eos_token_id, *ids[:room]]], device=model.device)
    with torch.no_grad():
        odds, _ = gate.log_odds(gate.evidence(gate_inputs(model, gate.layers, tokens)))
    return {
        "tokens": [tokenizer.decode([token]) for token in tokens[0].tolist()],
        "log_odds": [round(value, 4) for value in odds[0].tolist()],
        "threshold": float(gate.threshold),
        "open": (odds[0] > gate.threshold).tolist(),
    }
