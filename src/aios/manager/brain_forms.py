"""What the pages that ask a brain have in common: which one, on what text, under which goals."""

from collections.abc import Callable
from typing import Any

from nicegui import ui

from aios.actions import goals
from aios.brains.brain import Brain
from aios.manager.frame import Page, Site, ask_worker, begin_here, try_call
from aios.settings.goals import GoalFlags
from aios.store.goals import Goals
from chronomoe.data.store_info import read_info
from chronomoe.goals.settings import MAX_STRENGTH

LONGEST = 4000
"""Characters of a text."""


def choose_brain(page: Page, changed: Callable[[], Any] | None = None) -> ui.select | None:
    """A list of the brains; without any, what to do first."""
    names = Brain.names(page.site.root)
    if not names:
        begin_here(page.site, "No brain yet.")
        return None
    chosen = ui.select(names, label="Brain", value=names[0], on_change=changed)
    return chosen.props("dense outlined").classes("grow")


class TextForm:
    """A text, typed or taken from the held-out text of a domain of the brain's data."""

    def __init__(self, page: Page, brain: ui.select) -> None:
        self.page, self.brain = page, brain
        self.domain = ui.select([], label="Take held-out text of", on_change=self._take)
        self.domain.props("dense outlined").classes("grow")
        brain.on_value_change(self._offer)

    def field(self) -> None:
        """The text itself."""
        self.text = ui.textarea("Text").props(f"outlined maxlength={LONGEST} counter rows=4")
        self.text.props(f'hint="Up to {LONGEST:,} characters; a longer text is cut."')
        self._offer()

    @property
    def value(self) -> str:
        """As much of it as is read."""
        return (self.text.value or "")[:LONGEST]

    def _offer(self) -> None:
        found = try_call(_domains, self.page.site, self.brain.value).value or []
        self.domain.set_options(found, value=None)
        self.domain.set_visibility(bool(found))

    async def _take(self, event: Any) -> None:
        if event.value:
            chosen = self.brain.value, event.value
            outcome = await ask_worker(self.page.site, "text", chosen[0], domain=chosen[1], longest=LONGEST)
            if chosen != (self.brain.value, self.domain.value):
                return  # another has been chosen since
            if outcome.error:
                self.page.status.say(outcome.error, wrong=True)
            else:
                self.text.set_value(outcome.value)


def _domains(site: Site, brain: str) -> list[str]:
    place = Brain.at(site.root, brain).own_data
    return [] if place is None else [one.name for one in read_info(place).domains if one.heldout.tokens]


class GoalForm:
    """Goals to turn on, and how strongly; nothing where the workspace has none."""

    def __init__(self, page: Page) -> None:
        known = try_call(Goals(page.site.root).all, active_only=False).value or []
        self.chosen = ui.select(
            {str(goal.id): f"{goal.id}: {goal.text}" for goal in known}, label="Goals", multiple=True
        )
        self.chosen.props("dense outlined use-chips").classes("grow")
        self.strength = ui.number(
            "Strength, nats", value=GoalFlags.goal_strength, min=0, max=MAX_STRENGTH, step=0.5
        ).props("dense outlined")
        self.kl = ui.number("KL budget, nats", value=GoalFlags.goal_kl, min=0.0001, step=0.01).props("dense outlined")
        for field in (self.strength, self.kl):
            field.style("width: 130px").set_visibility(bool(known))
        self.chosen.set_visibility(bool(known))

    def flags(self) -> GoalFlags:
        """As the commands take them."""
        kept = GoalFlags()
        strength = kept.goal_strength if self.strength.value is None else float(self.strength.value)
        return GoalFlags(
            goal=tuple(self.chosen.value), goal_strength=strength, goal_kl=float(self.kl.value or kept.goal_kl)
        )


def explain_line(site: Site, brain: str, text: str, flags: GoalFlags) -> str:
    """The `aios goals explain` that shows the same; a long text is read from standard input."""
    shown = text if len(text) <= 80 and "\n" not in text else "-"
    return site.command_line(goals.explain, brain=brain, text=shown, goals=flags)
