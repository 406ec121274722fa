"""The page of goals: what is wanted, how much it counts, and which experts serve it."""

from dataclasses import dataclass
from typing import Any

from nicegui import ui

from aios.actions import goals
from aios.goal_text import LONGEST, MAX_WEIGHT
from aios.manager.experts_page import watch
from aios.manager.frame import Page, Site, empty, framed, heading, try_call
from aios.manager.goal_effect import GoalEffect
from aios.store.experts import Registry
from aios.store.goals import Goal, Goals


def add_to(site: Site) -> None:
    """Add the page."""

    @ui.page("/goals")
    def goals_page() -> None:
        with framed(site, "Goals", "Goals") as page:
            _Goals(page)


@dataclass
class _Card:
    """One goal as it is shown."""

    shown: tuple[Any, ...]
    """What it was made from: all but the weight."""
    weight: float
    """As it is stored."""
    element: ui.element
    field: ui.number


class _Goals:
    """All goals, active or not."""

    def __init__(self, page: Page) -> None:
        self.page, self.stored = page, Goals(page.site.root)
        heading("Goals")
        with ui.element("div").classes("panel"), ui.element("div").classes("line"):
            self.text = ui.input("New goal").props(f"maxlength={LONGEST} dense outlined").classes("grow")
            self.weight = _weight(MAX_WEIGHT)
            self.weight.style("width: 110px")
            ui.button("Add", on_click=self._add)
        self.nothing = ui.element("div").style("display: contents")
        self.content = ui.element("div").style("display: contents")
        self.effect = GoalEffect(page)
        self.cards: dict[int, _Card] = {}
        self.reason: str | None = None
        page.refresh = self.show
        self.show()
        watch(lambda: [self.stored.registry.file, self.stored.registry.database], self.show)

    def show(self) -> None:
        """Read the goals and show them; a card stays, with what is typed there, if nothing but the weight changed."""
        outcome = try_call(self.stored.all, active_only=False)
        experts = try_call(Registry(self.page.site.root).entries).value or []
        ids = {one.expert_uid: one.expert_id for one in experts}
        free = [one.expert_id for one in experts if one.is_active]
        found = outcome.value or []
        reason = outcome.error or ("" if found else "none")
        if reason != self.reason:
            self.reason = reason
            self._say_why_none(outcome.error)
        for number in set(self.cards) - {goal.id for goal in found}:
            self.cards.pop(number).element.delete()
        for place, goal in enumerate(found):
            linked = [ids.get(expert, expert) for expert in goal.experts]
            shown = goal.text, goal.active, linked, [one for one in free if one not in linked]
            card = self.cards.get(goal.id)
            if card is None or card.shown != shown:
                with self.content:
                    self.cards[goal.id] = _Card(shown, goal.weight, *self._card(goal, linked, shown[-1]))
                self.cards[goal.id].element.move(self.content, place)
                if card is not None:
                    card.element.delete()
            elif card.weight != goal.weight:
                card.weight = goal.weight
                card.field.set_value(goal.weight)

    def _say_why_none(self, error: str) -> None:
        self.nothing.clear()
        with self.nothing:
            if error:
                ui.label(error).classes("panel wrong")
            elif self.reason:
                empty(
                    "No goal yet. Say what is wanted above, then link it to an expert that serves it.",
                    self.page.site.command("goals", "add", "Quote licences word for word", "--expert-id", "laws"),
                )

    def _card(self, goal: Goal, linked: list[str], free: list[str]) -> tuple[ui.element, ui.number]:
        number = goal.id
        with ui.element("section").classes("panel") as card:
            with ui.element("div").classes("spread"):
                ui.label(f"{number}: {goal.text}").classes("grow").style("font-weight: 600; overflow-wrap: anywhere")
                ui.label("active" if goal.active else "inactive").classes("mark")
            with ui.element("div").classes("line"):
                if not linked:
                    ui.label("Linked to no expert.").classes("soft")
                for expert in linked:
                    self._link_of(number, expert)
            with ui.element("div").classes("line"):
                weight = _weight(goal.weight)
                weight.props(f'aria-label="Weight of goal {number}"').style("width: 96px")

                async def weigh() -> None:
                    if weight.value != self.cards[number].weight:
                        await self._weigh(number, weight.value or 0)

                weight.on("blur", weigh)
                weight.on("keydown.enter", weigh)
                chosen = ui.select(free, label="Expert", with_input=True).props("dense outlined").style("width: 200px")
                chosen.props(f'aria-label="Expert for goal {number}"')
                _small("Link", lambda: self._link(number, chosen.value))
                if goal.active:
                    _small("Deactivate", lambda: self.page.do(goals.deactivate, goal_id=number))
                else:
                    _small("Activate", lambda: self.page.do(goals.activate, goal_id=number))
                _small("Remove", lambda: self._remove(goal)).props("color=negative")
        return card, weight

    def _link_of(self, number: int, expert: str) -> None:
        async def unlink() -> None:
            await self.page.do(goals.unlink, goal_id=number, expert=expert)

        with ui.element("div").classes("line mark"):
            ui.label(expert)
            button = ui.button(icon="close", on_click=unlink).props("flat round size=xs")
            button.props["aria-label"] = f"Unlink {expert}"

    async def _add(self) -> None:
        outcome = await self.page.do(goals.add, text=self.text.value or "", weight=self.weight.value or 0)
        if not outcome.error:
            self.text.set_value("")

    async def _weigh(self, number: int, weight: float) -> None:
        await self.page.do(goals.weigh, goal_id=number, weight=weight)

    async def _link(self, number: int, expert: str | None) -> None:
        if not expert:
            self.page.status.say("Choose an expert first.", wrong=True)
            return
        await self.page.do(goals.link, goal_id=number, expert=expert)

    async def _remove(self, goal: Goal) -> None:
        command = self.page.site.command_line(goals.remove, goal_id=goal.id)
        if await self.page.confirm(f"Remove goal {goal.id} and its links for good? {goal.text}", "Remove", command):
            await self.page.do(goals.remove, goal_id=goal.id)


def _small(label: str, act: Any) -> ui.button:
    return ui.button(label, on_click=act).props("outline dense padding='4px 12px'")


def _weight(value: float) -> ui.number:
    return ui.number("Weight", value=value, min=0.001, max=MAX_WEIGHT, step=0.05).props("dense outlined")
