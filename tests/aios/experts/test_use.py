"""Attached experts at work: tokens counted in the registry, and what a gate makes of a text."""

import json

from aios.store.experts import Registry
from chronomoe.experts.file import read_expert, save_expert


def test_training_and_generating_count_tokens(aios, root, brain, expert):
    trained = Registry(root).get("laws").total_activations
    assert trained == 4 * 2 * 32
    assert aios("experts", "attach", "laws", "--brain", "straight", "--root", root).code == 0
    found = json.loads(
        aios("experts", "gate", "laws", "--brain", "straight", "--text", "Licence", "--json", "--root", root).out
    )
    assert len(found["tokens"]) == len(found["log_odds"]) == len(found["open"]) > 1
    listed = json.loads((brain / "experts.json").read_text())["attached"][0]
    weights = brain / f"experts/{listed['expert_uid']}.safetensors"
    one, header = read_expert(weights)
    one.gate.threshold.fill_(-1e9)
    save_expert(one, header, weights)
    assert aios("generate", "straight", "--max-new-tokens", 5, "--root", root).code == 0
    stats = json.loads(aios("experts", "stats", "--json", "--root", root).out)
    opened = stats["usage"][0]["total_activations"] - trained
    assert opened == 5, "the separator, and four of the five new tokens"
    assert 0 < Registry(root).get("laws").avg_routing_weight < 1
