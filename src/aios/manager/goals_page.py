"""The page of goals: what is wanted, how much it counts, and which experts serve it."""

from dataclasses import dataclass
from typing import Any

from nicegui import ui

from aios.goal_text import LONGEST
from aios.manager.experts_page import watch
from aios.manager.frame import Page, Site, attempt, empty, framed, heading
from aios.manager.goal_effect import GoalEffect
from aios.store.experts import Registry
from aios.store.goals import Goal, Goals


def add_to(site: Site) -> None:
    """Add the page."""

    @ui.page("/goals")
    def goals() -> None:
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
        self.page, self.goals = page, Goals(page.site.root)
        heading("Goals")
        with ui.element("div").classes("panel"), ui.element("div").classes("line"):
            self.text = ui.input("New goal").props(f"maxlength={LONGEST} dense outlined").classes("grow")
            self.weight = ui.number("Weight", value=1.0, min=0.001, max=1, step=0.05).props("dense outlined")
            self.weight.style("width: 110px")
            ui.button("Add", on_click=self._add)
        self.nothing = ui.element("div").style("display: contents")
        self.content = ui.element("div").style("display: contents")
        self.effect = GoalEffect(page)
        self.cards: dict[int, _Card] = {}
        self.said: str | None = None
        page.refresh = self.show
        self.show()
        watch(lambda: [self.goals.registry.file, self.goals.registry.database], self.show)

    def show(self) -> None:
        """Read the goals and show them; a card stays, with what is typed there, if nothing but the weight changed."""
        outcome = attempt(self.goals.all, active_only=False)
        experts = attempt(Registry(self.page.site.root).entries).value or []
        ids = {one.expert_uid: one.expert_id for one in experts}
        free = [one.expert_id for one in experts if one.is_active]
        goals = outcome.value or []
        told = outcome.error or ("" if goals else "none")
        if told != self.said:
            self.said = told
            self._say_why_none(outcome.error)
        for number in set(self.cards) - {goal.id for goal in goals}:
            self.cards.pop(number).element.delete()
        for place, goal in enumerate(goals):
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
            elif self.said:
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
                weight = ui.number("Weight", value=goal.weight, min=0.001, max=1, step=0.05).props("dense outlined")
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
                    _small("Deactivate", lambda: self._turn(number, "deactivate"))
                else:
                    _small("Activate", lambda: self._turn(number, "activate"))
                _small("Remove", lambda: self._remove(goal)).props("color=negative")
        return card, weight

    def _link_of(self, number: int, expert: str) -> None:
        async def unlink() -> None:
            command = ("goals", "unlink-expert", str(number), expert)
            await self.page.do(f"Goal {number} is not linked to {expert}.", command, self.goals.unlink, number, expert)

        with ui.element("div").classes("line mark"):
            ui.label(expert)
            button = ui.button(icon="close", on_click=unlink).props("flat round size=xs")
            button.props["aria-label"] = f"Unlink {expert}"

    async def _add(self) -> None:
        text, weight = self.text.value or "", self.weight.value
        command = adding(text, weight or 0)
        outcome = await self.page.do("Added the goal.", command, self.goals.add, text, weight=weight or 0)
        if not outcome.error:
            self.text.set_value("")

    async def _weigh(self, number: int, weight: float) -> None:
        command = ("goals", "weigh", str(number), f"{weight:.12g}")
        await self.page.do(f"Goal {number} has weight {weight:g}.", command, self.goals.weigh, number, weight)

    async def _turn(self, number: int, verb: str) -> None:
        act = self.goals.activate if verb == "activate" else self.goals.deactivate
        await self.page.do(f"Goal {number} is {verb}d.", ("goals", verb, str(number)), act, number)

    async def _link(self, number: int, expert: str | None) -> None:
        if not expert:
            self.page.told.say("Choose an expert first.", wrong=True)
            return
        command = ("goals", "link-expert", str(number), expert)
        await self.page.do(f"Goal {number} is linked to {expert}.", command, self.goals.link, number, expert)

    async def _remove(self, goal: Goal) -> None:
        command = ("goals", "remove", str(goal.id))
        if await self.page.sure(f"Delete goal {goal.id} and its links for good? {goal.text}", command, "Remove"):
            await self.page.do(f"Removed goal {goal.id}.", command, self.goals.remove, goal.id)


def _small(label: str, act: Any) -> ui.button:
    return ui.button(label, on_click=act).props("outline dense padding='4px 12px'")


def adding(text: str, weight: float) -> tuple[str, ...]:
    """The command that adds a goal; a text that reads like an option comes last, after ``--``."""
    weighed = ("--weight", f"{weight:.12g}")
    return ("goals", "add", *weighed, "--", text) if text.startswith("-") else ("goals", "add", text, *weighed)
