"""What can be done to one expert: buttons, questions and forms, each for an action of :mod:`aios.actions`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import ui

from aios.actions import Action, Done, experts, goals
from aios.brains.brain import Brain
from aios.goal_text import LONGEST
from aios.manager.frame import Outcome, Page, close, heading, try_call
from aios.store.experts import ExpertEntry, Registry
from aios.store.goals import Goal, Goals

Filled = tuple[list[Any], Callable[[], dict[str, Any]]]
"""The fields of a form, and the arguments of its action as they are filled in now."""


async def _form(
    page: Page, title: str, yes: str, action: Action[...], fill: Callable[[], Filled], color: str = "primary"
) -> Outcome[Done] | None:
    """A dialog with the fields that ``fill`` makes and the command they come to; what came of it, if it was done."""
    with page.dialog() as dialog:
        heading(title, 2)
        fields, arguments = fill()
        command, wrong = ui.label().classes("command"), ui.label().classes("wrong")

        def write() -> None:
            command.set_text(page.site.command_line(action, **arguments()))

        for one in fields:
            one.on_value_change(write)
        write()

        async def enter() -> None:
            button.disable()  # a second click does nothing
            outcome = await page.do(action, **arguments())
            wrong.set_text(outcome.error)
            if outcome.error:
                button.enable()
            else:
                dialog.submit(outcome)

        with ui.element("div").classes("line"):
            button = ui.button(yes, on_click=enter, color=color)
            ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat")
    done: Outcome[Done] | None = await dialog
    close(dialog)
    return done


async def create(page: Page) -> None:
    """Ask for a new expert and create it."""
    others = try_call(Registry(page.site.root).entries).value or []

    def fill() -> Filled:
        expert = _field("Id", "letters, digits, - and _").props("autofocus")
        name = _field("Name")
        description = _field("Description")
        category = _field("Category", "general")
        goal = _field("Goal", "what it is for")
        parent = ui.select(["", *(one.expert_id for one in others)], label="Below", value="")

        def arguments() -> dict[str, Any]:
            return {
                "expert": expert.value.strip(),
                "name": name.value,
                "description": description.value,
                "category": category.value,
                "goal": [goal.value] if goal.value else None,
                "parent": parent.value or None,
            }

        return [expert, name, description, category, goal, parent], arguments

    await _form(page, "New expert", "Create", experts.create, fill)


def actions(page: Page, one: ExpertEntry) -> None:
    """The row of buttons."""
    name = one.expert_id
    turns = {
        "Unfreeze" if one.is_frozen else "Freeze": experts.unfreeze if one.is_frozen else experts.freeze,
        "Deactivate" if one.is_active else "Activate": experts.deactivate if one.is_active else experts.activate,
    }
    with ui.element("div").classes("line"):
        for label, turn in turns.items():
            _button(label, partial(_turn, page, turn, name))
        _button("Set parent", lambda: _set_parent(page, one))
        if one.parent_expert_id:
            _button("Clear parent", lambda: page.do(experts.clear_parent, expert=name))
        _button("Rename", lambda: _rename(page, one))
        _button("Train", lambda: page.go(f"/jobs?expert={name}#train"))
        _button("Delete", lambda: _delete(page, one)).props("color=negative")


async def _turn(page: Page, turn: Action[...], name: str) -> None:
    await page.do(turn, expert=name)


async def _set_parent(page: Page, one: ExpertEntry) -> None:
    entries = Registry(page.site.root).entries()
    others = [other.expert_id for other in entries if other.expert_id != one.expert_id]

    def fill() -> Filled:
        if not others:
            ui.label("There is no other expert.")
        parent = ui.select(others, label="Parent", value=others[0] if others else None)
        return [parent], lambda: {"expert": one.expert_id, "parent": parent.value or ""}

    await _form(page, f"Put {one.expert_id} below", "Set parent", experts.set_parent, fill)


async def _rename(page: Page, one: ExpertEntry) -> None:
    def fill() -> Filled:
        new = _field("New id").props("autofocus")
        return [new], lambda: {"expert": one.expert_id, "new": new.value.strip()}

    renamed = await _form(page, f"Rename {one.expert_id}", "Rename", experts.rename, fill)
    if renamed is not None and renamed.value is not None:
        page.go(f"/experts/{renamed.value.value['expert_id']}")


async def _delete(page: Page, one: ExpertEntry) -> None:
    """The question before deleting, with what becomes of the experts below."""

    def fill() -> Filled:
        ui.label("This cannot be undone.")
        policies = {
            "refuse": "Refuse if experts are below it",
            "orphan": "Leave those below it without a parent",
            "cascade": "Delete all below it too",
        }
        children = ui.radio(policies, value="refuse")
        force = ui.checkbox("Even if it is attached to a brain")

        def arguments() -> dict[str, Any]:
            return {"expert": one.expert_id, "children": children.value, "force": force.value, "yes": True}

        return [children, force], arguments

    title = f"Delete {one.expert_id} with its weights?"
    if await _form(page, title, "Delete", experts.delete, fill, color="negative"):
        page.go("/")


def goals_of(page: Page, one: ExpertEntry) -> None:
    """The goals of an expert, and linking another."""
    known = try_call(Goals(page.site.root).all, active_only=False).value or []
    linked = [goal for goal in known if one.expert_uid in goal.experts]
    with ui.element("div").classes("panel"):
        heading("Goals", 2)
        _links(page, [(goal, one.expert_id) for goal in linked], "No goal is linked to it.")
        _link(page, [goal for goal in known if goal not in linked], lambda: one.expert_id)


def slots_of(page: Page, brain: str) -> None:
    """The goals linked to a brain's own experts, and linking another to one of them."""
    known = try_call(Goals(page.site.root).all, active_only=False).value or []
    links = [(goal, slot) for goal in known for slot in goal.experts if slot.startswith(f"{brain}:")]
    with ui.element("section").classes("panel"):
        heading("Goals of its own experts", 2)
        _links(page, links, "No goal is linked to one of them.")
        place = ui.input("Layer and expert, as 2.5 or *.5").props("maxlength=20 dense outlined")
        _link(page, known, lambda: f"{brain}:{place.value.strip()}")


def _links(page: Page, links: list[tuple[Goal, str]], none: str) -> None:
    """Goals with the experts they are linked to, and unlinking them."""
    if not links:
        ui.label(none).classes("soft")
    for goal, expert in links:
        with ui.element("div").classes("spread"):
            where = f" ({expert})" * (":" in expert) + " (inactive)" * (not goal.active)
            ui.label(f"{goal.id}: {goal.text}{where}").classes("grow")

            async def unlink(number: int = goal.id, expert: str = expert) -> None:
                await page.do(goals.unlink, goal_id=number, expert=expert)

            button = ui.button("Unlink", on_click=unlink).props("flat dense")
            button.props["aria-label"] = f"Unlink goal {goal.id} from {expert}"


def _link(page: Page, known: list[Goal], expert: Callable[[], str]) -> None:
    """Choosing a goal and linking it."""
    with ui.element("div").classes("line"):
        choices = {goal.id: f"{goal.id}: {goal.text[:80]}" for goal in known}
        chosen = ui.select(choices, label="Goal").props("dense outlined").classes("grow")

        async def link() -> None:
            if chosen.value is None:
                page.status.say("Choose a goal first; the Goals page adds one.", wrong=True)
                return
            await page.do(goals.link, goal_id=chosen.value, expert=expert())

        ui.button("Link", on_click=link).props("outline")


def brains_of(page: Page, one: ExpertEntry) -> None:
    """Where an expert is attached, and attaching it elsewhere."""
    known = Brain.names(page.site.root)
    free = [brain for brain in known if brain not in one.attached_to]
    with ui.element("div").classes("panel"):
        heading("Brains", 2)
        if not one.attached_to:
            ui.label("It is attached to no brain.").classes("soft")
        for brain in one.attached_to:
            with ui.element("div").classes("spread"):
                ui.label(brain)

                async def detach(name: str = brain) -> None:
                    command = page.site.command_line(experts.detach, expert=one.expert_id, brain=name)
                    if await page.confirm(f"Detach {one.expert_id} from {name}?", "Detach", command):
                        await page.do(experts.detach, expert=one.expert_id, brain=name)

                ui.button("Detach", on_click=detach).props("flat dense")
        if not known:
            ui.label("No brain yet; `aios train` makes one.").classes("soft")
            return
        if not free:
            return
        with ui.element("div").classes("line"):
            chosen = ui.select(free, label="Brain", value=free[0]).props("dense outlined").classes("grow")
            force = ui.checkbox("force").tooltip("Even if it was trained in another base, when its shapes fit")

            async def attach() -> None:
                button.props("loading")
                await page.do(experts.attach, expert=one.expert_id, brain=chosen.value, force=bool(force.value))
                button.props(remove="loading")

            button = ui.button("Attach", on_click=attach).props("outline")


def _field(label: str, hint: str = "") -> ui.input:
    return ui.input(label, placeholder=hint).props(f"maxlength={LONGEST}")


def _button(label: str, act: Callable[[], Any]) -> ui.button:
    return ui.button(label, on_click=act).props("outline dense padding='4px 12px'")
