"""What people see of a value: tables and rows of facts."""

from collections.abc import Callable
from typing import Any


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print rows under their columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: a name may have brackets
    Console(highlight=False).print(table)


def _facts(found: dict[str, Any]) -> None:
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {_words(value)}".rstrip())


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items() if entry is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _brains(found: list[dict[str, Any]]) -> None:
    rows = []
    for one in found:
        name = f"{one['family']}/{one['name']}"
        if "problem" in one:
            rows.append([name, "", "", "", one["problem"]])
            continue
        bits = "" if one["bits_per_byte"] is None else f"{one['bits_per_byte']:.4f}"
        state = "finished" if one["finished"] else "in training"
        rows.append([name, str(one["steps"]), bits, str(one["megabytes"]), state])
    print_table(["brain", "steps", "bits per byte", "MB", "state"], rows)


def _experts(found: list[dict[str, Any]]) -> None:
    if "used" in found[0]:
        _gates_against(found)
        return
    rows = []
    for one in found:
        state = ["active" if one["is_active"] else "inactive"]
        state += ["frozen"] * one["is_frozen"] + ["no weights"] * (not one["version"])
        uses = one["total_activations"]
        used = [str(uses), f"{one['avg_routing_weight']:.3f}"] if uses else ["", ""]
        kin = [one["parent_expert_id"] or "", ", ".join(one["attached_to"])]
        rows.append([one["expert_id"], one["category"], ", ".join(state), *used, str(len(one["goals"]) or ""), *kin])
    print_table(["expert", "category", "state", "activations", "weight", "goals", "parent", "attached to"], rows)


def _gates_against(found: list[dict[str, Any]]) -> None:
    domains = list(dict.fromkeys(row["domain"] for row in found))
    shares = {(row["expert_id"], row["domain"]): f"{row['used']:.1%}" for row in found}
    names = list(dict.fromkeys(row["expert_id"] for row in found))
    rows = [[name, *(shares.get((name, one), "") for one in domains)] for name in names]
    print_table(["gate of", *(f"on {one}" for one in domains)], rows)


def _expert_stats(stats: dict[str, Any]) -> None:
    print(_words({name.replace("_", " "): value for name, value in stats.items() if name != "usage"}))
    rows = [
        [one["expert_id"], str(one["total_activations"]), f"{one['share']:.1%}", f"{one['avg_routing_weight']:.3f}"]
        for one in stats["usage"]
        if one["total_activations"]
    ]
    if rows:
        print_table(["expert", "activations", "share", "weight"], rows)


def _gate(found: dict[str, Any]) -> None:
    rows = [
        [repr(token), f"{odds:+.2f}", "open" if is_open else ""]
        for token, odds, is_open in zip(found["tokens"], found["log_odds"], found["open"], strict=True)
    ]
    print_table(["token", f"log-odds (opens above {found['threshold']:.2f})", ""], rows)


def _goals(found: dict[str, Any]) -> None:
    if not found["items"]:
        return
    rows = [
        [
            str(one["id"]),
            one["text"],
            f"{one['weight']:g}",
            "active" if one["active"] else "inactive",
            ", ".join(one["expert_ids"]),
        ]
        for one in found["items"]
    ]
    print_table(["goal", "text", "weight", "state", "experts"], rows)


def _explained(found: dict[str, Any]) -> None:
    print(f"On this text: output KL {found['text_kl']:.4f} nats a token")
    rows = [
        [f"expert {name}: gate open", f"{before:.1%}", f"{found['on']['open'][name]:.1%}"]
        for name, before in found["off"]["open"].items()
    ]
    for layer, shares in enumerate(found["off"]["share"]):
        after = found["on"]["share"][layer]
        rows += [
            [f"layer {layer}, expert {number}", f"{before:.1%}", f"{now:.1%}"]
            for number, (before, now) in enumerate(zip(shares, after, strict=True))
        ]
    print_table([f"share of {found['tokens']} tokens", "goals off", "goals on"], rows)


def _taught(found: dict[str, Any]) -> None:
    if found["finished"]:
        rows = [
            [text, f"{bits['off']:.4f}", f"{bits['on']:.4f}", f"{bits['on'] / bits['off'] - 1:+.2%}"]
            for text, bits in found["bits_per_byte"].items()
        ]
        print_table(["bits per byte on the text of", "goal off", "goal on", ""], rows)


def _evaluated(found: dict[str, dict[str, float]]) -> None:
    titles = {"base": "base alone", "experts": "with experts", "goals": "goals on"}
    rows = []
    for domain, before in found["base"].items():
        after = [one[domain] for name, one in found.items() if name != "base"]
        rows.append([domain, f"{before:.4f}", *(f"{bits:.4f} ({bits / before - 1:+.1%})" for bits in after)])
    print_table(["bits per byte", *(titles[name] for name in found)], rows)


RENDERERS: dict[str, Callable[[Any], None]] = {
    "brains list": _brains,
    "brains show": _facts,
    "doctor": _facts,
    "evaluate": _evaluated,
    "experts gate": _gate,
    "experts list": _experts,
    "experts show": _facts,
    "experts stats": _expert_stats,
    "goals explain": _explained,
    "goals list": _goals,
    "goals list-for-expert": _goals,
    "goals teach": _taught,
}
"""How people see the value of a command, if there is one; of other commands they see the sentence alone."""
