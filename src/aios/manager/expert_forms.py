"""What can be done to one expert: buttons, questions and forms. Each calls what the command of its name calls."""

from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from aios.brains.bundle import brain_names
from aios.goal_text import LONGEST
from aios.goals.slots import link as link_to
from aios.manager import work
from aios.manager.frame import Outcome, Page, attempt, heading, put_away
from aios.store.experts import ExpertEntry, Registry
from aios.store.goals import Goal, Goals

Filled = tuple[list[Any], Callable[[], tuple[str, ...]], Callable[[], Awaitable[Outcome[Any]]]]
"""The fields of a form, the words of its command as they are filled in now, and what does it."""


async def _form(
    page: Page, title: str, yes: str, fill: Callable[[], Filled], color: str = "primary"
) -> Outcome[Any] | None:
    """A dialog with the fields that ``fill`` makes and the command they come to; what came of it, if it was done."""
    with page.dialog() as dialog:
        heading(title, 2)
        fields, words, act = fill()
        command, wrong = ui.label().classes("command"), ui.label().classes("wrong")

        def write() -> None:
            command.set_text(page.site.command(*words()))

        for one in fields:
            one.on_value_change(write)
        write()

        async def enter() -> None:
            button.disable()  # a second click does nothing
            outcome = await act()
            wrong.set_text(outcome.error)
            if outcome.error:
                button.enable()
            else:
                dialog.submit(outcome)

        with ui.element("div").classes("line"):
            button = ui.button(yes, on_click=enter, color=color)
            ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat")
    done: Outcome[Any] | None = await dialog
    put_away(dialog)
    return done


async def create(page: Page) -> None:
    """Ask for a new expert and enter it."""
    registry = Registry(page.site.root)
    others = attempt(registry.entries).value or []

    def fill() -> Filled:
        expert_id = _field("Id", "letters, digits, - and _").props("autofocus")
        name = _field("Name")
        description = _field("Description")
        category = _field("Category", "general")
        goal = _field("Goal", "what it is for")
        parent = ui.select(["", *(one.expert_id for one in others)], label="Below", value="")
        flags = {"--name": name, "--description": description, "--category": category, "--goal": goal}

        def words() -> tuple[str, ...]:
            given = [f"{flag}={one.value}" for flag, one in flags.items() if one.value]
            below = ["--parent", parent.value] if parent.value else []
            return ("experts", "create", expert_id.value.strip(), *given, *below)

        def act() -> Awaitable[Outcome[Any]]:
            return page.do(
                f"Entered {expert_id.value.strip()}; it has no weights yet.",
                words(),
                registry.create,
                expert_id.value.strip(),
                name=name.value,
                description=description.value,
                category=category.value,
                goals=[goal.value] if goal.value else [],
                parent=parent.value or None,
            )

        return [expert_id, *flags.values(), parent], words, act

    await _form(page, "New expert", "Enter", fill)


def actions(page: Page, one: ExpertEntry) -> None:
    """The row of buttons."""
    registry, name = Registry(page.site.root), one.expert_id

    async def set_to(verb: str, words: str) -> None:
        command = ("experts", verb, name)
        await page.do(words, command, work.change_expert, page.site.root, verb, name, heavy=bool(one.attached_to))

    with ui.element("div").classes("line"):
        if one.is_frozen:
            _button("Unfreeze", lambda: set_to("unfreeze", f"{name} may be trained."))
        else:
            _button("Freeze", lambda: set_to("freeze", f"Froze {name}."))
        if one.is_active:
            _button("Deactivate", lambda: set_to("deactivate", f"{name} is inactive."))
        else:
            _button("Activate", lambda: set_to("activate", f"{name} is active."))
        _button("Set parent", lambda: _set_parent(page, one))
        if one.parent_expert_id:

            async def clear() -> None:
                await page.do(f"{name} has no parent.", ("experts", "clear-parent", name), registry.clear_parent, name)

            _button("Clear parent", clear)
        _button("Rename", lambda: _rename(page, one))
        _button("Train", lambda: page.go(f"/jobs?expert={name}#train"))
        _button("Delete", lambda: _delete(page, one)).props("color=negative")


async def _set_parent(page: Page, one: ExpertEntry) -> None:
    registry = Registry(page.site.root)
    others = [other.expert_id for other in registry.entries() if other.expert_id != one.expert_id]

    def fill() -> Filled:
        if not others:
            ui.label("There is no other expert.")
        parent = ui.select(others, label="Parent", value=others[0] if others else None)

        def words() -> tuple[str, ...]:
            return ("experts", "set-parent", one.expert_id, parent.value or "PARENT")

        def act() -> Awaitable[Outcome[Any]]:
            told = f"{one.expert_id} is below {parent.value}."
            return page.do(told, words(), registry.set_parent, one.expert_id, parent.value or "")

        return [parent], words, act

    await _form(page, f"Put {one.expert_id} below", "Set parent", fill)


async def _rename(page: Page, one: ExpertEntry) -> None:
    def fill() -> Filled:
        new = _field("New id").props("autofocus")

        def words() -> tuple[str, ...]:
            return ("experts", "rename", one.expert_id, new.value.strip() or "NEW")

        def act() -> Awaitable[Outcome[Any]]:
            asked = new.value.strip()
            change, heavy = work.change_expert, bool(one.attached_to)
            told, root = f"Renamed to {asked}.", page.site.root
            return page.do(told, words(), change, root, "rename", one.expert_id, asked, heavy=heavy)

        return [new], words, act

    renamed = await _form(page, f"Rename {one.expert_id}", "Rename", fill)
    if renamed is not None and renamed.value is not None:
        page.go(f"/experts/{renamed.value.expert_id}")


async def _delete(page: Page, one: ExpertEntry) -> None:
    """The question before deleting, with what becomes of those below."""

    def fill() -> Filled:
        ui.label("This cannot be undone.")
        children = ui.radio(
            {"refuse": "Refuse if experts are below it", "orphan": "Leave those below it without a parent",
             "cascade": "Delete all below it too"},
            value="refuse",
        )  # fmt: skip
        force = ui.checkbox("Even if it is attached to a brain")

        def words() -> tuple[str, ...]:
            policy = ["--children", children.value] if children.value != "refuse" else []
            return ("experts", "delete", one.expert_id, *policy, *(["--force"] if force.value else []), "--yes")

        def act() -> Awaitable[Outcome[Any]]:
            delete, policy = Registry(page.site.root).delete, children.value
            return page.do(f"Deleted {one.expert_id}.", words(), delete, one.expert_id, policy, force=bool(force.value))

        return [children, force], words, act

    if await _form(page, f"Delete {one.expert_id} with its weights?", "Delete", fill, color="negative"):
        page.go("/")


def goals_of(page: Page, one: ExpertEntry) -> None:
    """The goals of an expert, and linking another."""
    known = attempt(Goals(page.site.root).all, active_only=False).value or []
    linked = [goal for goal in known if one.expert_uid in goal.experts]
    with ui.element("div").classes("panel"):
        heading("Goals", 2)
        _links(page, [(goal, one.expert_id) for goal in linked], "No goal is linked to it.")
        _link(page, [goal for goal in known if goal not in linked], lambda: one.expert_id)


def slots_of(page: Page, brain: str) -> None:
    """The goals linked to a brain's own experts, and linking another to one of them."""
    known = attempt(Goals(page.site.root).all, active_only=False).value or []
    links = [(goal, slot) for goal in known for slot in goal.experts if slot.startswith(f"{brain}:")]
    with ui.element("section").classes("panel"):
        heading("Goals of its own experts", 2)
        _links(page, links, "No goal is linked to one of them.")
        place = ui.input("Layer and expert, as 2.5 or *.5").props("maxlength=20 dense outlined")
        _link(page, known, lambda: f"{brain}:{place.value.strip()}")


def _links(page: Page, links: list[tuple[Goal, str]], none: str) -> None:
    """Goals with whom they are linked to, and taking the link away."""
    if not links:
        ui.label(none).classes("soft")
    for goal, expert in links:
        with ui.element("div").classes("spread"):
            where = f" ({expert})" * (":" in expert) + " (inactive)" * (not goal.active)
            ui.label(f"{goal.id}: {goal.text}{where}").classes("grow")

            async def unlink(number: int = goal.id, expert: str = expert) -> None:
                command = ("goals", "unlink-expert", str(number), expert)
                told = f"Goal {number} is not linked to {expert}."
                await page.do(told, command, Goals(page.site.root).unlink, number, expert)

            button = ui.button("Unlink", on_click=unlink).props("flat dense")
            button.props["aria-label"] = f"Unlink goal {goal.id} from {expert}"


def _link(page: Page, goals: list[Goal], expert: Callable[[], str]) -> None:
    """Choosing a goal and linking it."""
    with ui.element("div").classes("line"):
        choices = {goal.id: f"{goal.id}: {goal.text[:80]}" for goal in goals}
        chosen = ui.select(choices, label="Goal").props("dense outlined").classes("grow")

        async def link() -> None:
            if chosen.value is None:
                page.told.say("Choose a goal first; the Goals page adds one.", wrong=True)
                return
            command = ("goals", "link-expert", str(chosen.value), expert())
            told = f"Goal {chosen.value} is linked to {expert()}."
            await page.do(told, command, link_to, page.site.root, chosen.value, expert())

        ui.button("Link", on_click=link).props("outline")


def brains_of(page: Page, one: ExpertEntry) -> None:
    """Where an expert is attached, and attaching it elsewhere."""
    known = brain_names(page.site.root)
    free = [brain for brain in known if brain not in one.attached_to]
    with ui.element("div").classes("panel"):
        heading("Brains", 2)
        if not one.attached_to:
            ui.label("It is attached to no brain.").classes("soft")
        for brain in one.attached_to:
            with ui.element("div").classes("spread"):
                ui.label(brain)

                async def detach(name: str = brain) -> None:
                    command = ("experts", "detach", one.expert_id, "--brain", name)
                    if await page.sure(f"Take {one.expert_id} off {name}?", command, "Detach"):
                        told = f"Detached {one.expert_id} from {name}."
                        await page.do(told, command, work.detach, page.site.root, one.expert_id, name, heavy=True)

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
                forced = ["--force"] if force.value else []
                command = ("experts", "attach", one.expert_id, "--brain", chosen.value, *forced)
                button.props("loading")
                told = f"Attached {one.expert_id} to {chosen.value}."
                root, use = page.site.root, bool(force.value)
                await page.do(told, command, work.attach, root, one.expert_id, chosen.value, use, heavy=True)
                button.props(remove="loading")

            button = ui.button("Attach", on_click=attach).props("outline")


def _field(label: str, hint: str = "") -> ui.input:
    return ui.input(label, placeholder=hint).props(f"maxlength={LONGEST}")


def _button(label: str, act: Callable[[], Any]) -> ui.button:
    return ui.button(label, on_click=act).props("outline dense padding='4px 12px'")
