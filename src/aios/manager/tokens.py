"""Tokens of a text coloured by expert, and shares, as HTML in which every word of others is escaped. No web in here."""

from html import escape
from typing import Any

from aios.manager.charts import PALETTE

_COLOURS = [*PALETTE, "#F0E442"]
_STROKES = ["solid", "dashed", "dotted", "double"]
MOVE = """(event) => {
    const step = {ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling'}[event.key];
    const next = step && event.target[step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1; next.tabIndex = 0; next.focus();
}"""
"""One stop for Tab; the arrow keys walk from token to token."""


def changed(before: dict[str, Any], after: dict[str, Any], layer: int) -> list[bool]:
    """For each token: does the layer choose other experts, or is another set of attached experts open?"""
    pairs = zip(before["chosen"][layer], after["chosen"][layer], strict=True)
    return [
        set(old) != set(new)
        or any(opened[at] != after["open_at"][name][at] for name, opened in before["open_at"].items())
        for at, (old, new) in enumerate(pairs)
    ]


def tokens_html(pieces: list[str], routed: dict[str, Any], layer: int, before: dict[str, Any] | None = None) -> str:
    """The text, each token in the colour of its foremost expert; those that chose otherwise ``before`` are marked."""
    marks = [False] * len(pieces) if before is None else changed(before, routed, layer)
    parts = []
    for at, piece in enumerate(pieces):
        chosen = _weighed(routed, layer, at)
        label = f"{at}: {'beginning' if not at else repr(piece)}, " + _words(chosen)
        attached = [name for name, opened in routed["open_at"].items() if opened[at]]
        label += f"; open: {', '.join(attached)}" if attached else ""
        label += f"; segments {routed['segments'][at]}" if routed["segments"] else ""
        if before is not None and marks[at]:
            label += f"; goals off: {_words(_weighed(before, layer, at))}"
        kinds = ["token"] + ["changed"] * marks[at] + ["attached"] * bool(attached)
        style = colour(chosen[0][0]) if chosen else ""
        shown = "▸" if not at else piece.replace("\n", "↵\n")
        parts.append(
            f'<span role="option" tabindex="{-1 if at else 0}" class="{" ".join(kinds)}" style="{style}" '
            f'aria-label="{escape(label)}">{escape(shown)}</span>'
        )
    return "".join(parts)


def colour(expert: int) -> str:
    """Colour and stroke of an expert, as style."""
    stroke = _STROKES[expert // len(_COLOURS) % len(_STROKES)]
    return f"--expert: {_COLOURS[expert % len(_COLOURS)]}; border-bottom-style: {stroke}"


def _weighed(routed: dict[str, Any], layer: int, at: int) -> list[tuple[int, float]]:
    pairs = zip(routed["chosen"][layer][at], routed["weights"][layer][at], strict=True)
    return sorted((pair for pair in pairs if pair[0] >= 0), key=lambda pair: -pair[1])


def _words(chosen: list[tuple[int, float]]) -> str:
    return ", ".join(f"expert {expert} {weight:.2f}" for expert, weight in chosen) or "halted before"


def shares_html(found: dict[str, Any], layer: int, with_goals: bool) -> str:
    """Each expert's colour, and its share of the assignments: of this text, goals off and on, and of each domain."""
    columns = {"this text": found["off"]} | ({"goals on": found["on"]} if with_goals else {})
    columns |= {f"held-out {name}": routed for name, routed in found["domains"].items()}
    rows = [
        (f'<span class="token" style="{colour(expert)}">expert {expert}</span>',
         [routed["share"][layer][expert] for routed in columns.values()])
        for expert in range(len(found["off"]["share"][layer]))
    ]  # fmt: skip
    rows += [
        (f"{escape(name)}, gate open", [routed["open"][name] for routed in columns.values()])
        for name in found["off"]["open"]
    ]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{share:.1%}</td>" for share in values)}</tr>'
        for name, values in rows
    )
    return f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>"
