"""What the active goals do in a brain, while a slider moves: a panel of the page of goals."""

import asyncio
from math import log10
from typing import Any

from nicegui import ui

from aios.manager.brain_forms import TextForm, choose_brain, explain_line
from aios.manager.frame import Page, ask_worker, heading
from aios.settings.goals import GoalFlags
from chronomoe.goals.settings import MAX_STRENGTH

_QUIET = 0.25
"""Seconds a slider rests before its effect is measured."""


class GoalEffect:
    """Sliders of strength and budget; output KL, and shares before and after."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.busy = self.moved = False
        with ui.element("section").classes("panel"):
            heading("What the active goals do", 2)
            with ui.element("div").classes("line"):
                brain = choose_brain(page)
                if brain is None:
                    return
                self.brain, self.text = brain, TextForm(page, brain)
            self.text.field()
            with ui.element("div").classes("two"):
                self.strength = self._slider(
                    "Strength for the gates of attached experts", 0, MAX_STRENGTH, 0.25, GoalFlags.goal_strength
                )
                # Its value is the logarithm: budgets are of one size or another.
                self.budget = self._slider(
                    "KL budget for the brain's own experts", -4, -1, 0.25, log10(GoalFlags.goal_kl)
                )
            self.words = ui.label("Give a text, then move a slider.").classes("talk").props('role="status"')
            with ui.element("div").classes("scroll").props('tabindex="0" role="region" aria-label="Shares"'):
                self.table = ui.table(columns=_COLUMNS, rows=[], row_key="name", pagination={"rowsPerPage": 0})
                self.table.props("flat dense hide-bottom").set_visibility(False)
        for field in (self.brain, self.strength, self.budget, self.text.text):
            field.on_value_change(self._move)
        self.strength.on_value_change(self._name)
        self.budget.on_value_change(self._name)
        self._name()

    def _slider(self, label: str, low: float, high: float, step: float, value: float) -> ui.slider:
        with ui.element("div").style("padding: 0 10px"):
            self.labels = [*getattr(self, "labels", []), ui.label(label)]
            return ui.slider(min=low, max=high, step=step, value=value).props(f'aria-label="{label}"')

    def flags(self) -> GoalFlags:
        """As the command takes them."""
        return GoalFlags(
            goals_active=True, goal_strength=self.strength.value, goal_kl=float(f"{10**self.budget.value:.2g}")
        )

    def _name(self) -> None:
        flags = self.flags()
        self.labels[0].set_text(f"Strength for the gates of attached experts: {flags.goal_strength:g} nats")
        self.labels[1].set_text(f"Budget for the brain's own experts: KL of {flags.goal_kl:g} nats a token")

    async def _move(self) -> None:
        """Measure where the slider comes to rest; what it passes meanwhile is not waited for."""
        self.moved = True
        if self.busy or not self.text.value.strip():
            return
        self.busy = True
        try:
            while self.moved:
                self.moved = False
                await asyncio.sleep(_QUIET)
                if not self.moved:
                    await self._measure()
        finally:
            self.busy = False

    async def _measure(self) -> None:
        self.words.set_text("Measuring; a brain that is not loaded yet takes some seconds.")
        brain, text, flags = self.brain.value, self.text.value, self.flags()
        outcome = await ask_worker(self.page.site, "explain", brain, text=text, flags=flags)
        if brain != self.brain.value:
            return  # choosing another has begun another measurement
        command = explain_line(self.page.site, brain, text, flags)
        self.table.set_visibility(not outcome.error)
        self.page.status.say(outcome.error or "Measured.", command, wrong=bool(outcome.error))
        if outcome.value is None:
            self.words.set_text("")
            return
        found = outcome.value
        first = f"On this text ({found['tokens']} tokens): output KL {found['text_kl']:.5f} nats a token"
        self.words.set_text("\n".join([first, *found["lines"]]))
        self.table.rows[:] = _rows(found)
        self.table.update()


_COLUMNS = [
    {"name": name, "label": label, "field": name, "align": align}
    for name, label, align in (
        ("name", "Share of this text's tokens", "left"),
        ("before", "goals off", "right"),
        ("after", "goals on", "right"),
    )
]


def _rows(found: dict[str, Any]) -> list[dict[str, str]]:
    rows = [
        (f"gate of {name} open", before, found["on"]["open"][name]) for name, before in found["off"]["open"].items()
    ]
    for layer, shares in enumerate(found["off"]["share"]):
        after = found["on"]["share"][layer]
        rows += [(f"layer {layer}, expert {at}", share, after[at]) for at, share in enumerate(shares)]
    return [{"name": name, "before": f"{before:.1%}", "after": f"{after:.1%}"} for name, before, after in rows]
