"""What all pages share: the frame with its navigation, and calling actions with their command and errors shown."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from nicegui import run, ui

from aios.actions import Action, Done
from aios.actions.table import command_line, command_of
from aios.manager.jobs import Jobs
from aios.manager.runs import Runs
from aios.manager.worker import Worker
from aios.sentence import sentence
from aios.workspace import Workspace

Value = TypeVar("Value")
STYLE = Path(__file__).with_name("page.css")
PLACES = {
    "Experts": "/",
    "Goals": "/goals",
    "Training": "/training",
    "Routing": "/routing",
    "Chat": "/chat",
    "Jobs": "/jobs",
}


@dataclass(frozen=True)
class Site:
    """What the pages of one workspace work on."""

    root: Path
    jobs: Jobs = field(init=False)
    runs: Runs = field(init=False)
    worker: Worker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "jobs", Jobs(self.root))
        object.__setattr__(self, "runs", Runs(self.root))
        object.__setattr__(self, "worker", Worker(self.root))

    @property
    def here(self) -> list[str]:
        """Words that tell a command which workspace is meant."""
        return [] if self.root == Path() else [f"--root={self.root}"]

    def command(self, *words: str) -> str:
        """An ``aios`` command for this workspace."""
        return Workspace(self.root).command(*words)

    def command_line(self, action: Action[...], **arguments: Any) -> str:
        """The ``aios`` command that calls an action."""
        return command_line(self.root, action, arguments)


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What a function gave, or the sentence it failed with."""

    value: Value | None = None
    error: str = ""


def try_call(function: Callable[..., Value], *arguments: Any, **options: Any) -> Outcome[Value]:
    """Call it; whatever it raises becomes the sentence the command line would print."""
    try:
        return Outcome(function(*arguments, **options))
    except Exception as error:
        return Outcome(error=sentence(error))


async def in_thread(function: Callable[..., Value], *arguments: Any, **options: Any) -> Outcome[Value]:
    """Call it in a thread: the page stays alive meanwhile."""
    return await run.io_bound(try_call, function, *arguments, **options) or Outcome(error="the page is being closed.")


async def ask_worker(site: Site, task: str, *given: Any, **arguments: Any) -> Outcome[Any]:
    """Ask the process that runs brains; questions that wait for each other keep no page waiting."""
    question = partial(try_call, site.worker.ask, task, *given, **arguments)
    return await asyncio.get_running_loop().run_in_executor(site.worker.threads, question)


class StatusBar:
    """The strip at the bottom: what was done last, and the command that does the same."""

    def __init__(self) -> None:
        with ui.element("div").classes("status").props('role="status" aria-live="polite"') as self.strip:
            self.words = ui.label().classes("sentence")
            self.command = ui.label().classes("command")
            close = ui.button(icon="close", on_click=lambda: self.strip.set_visibility(False))
            close.props("flat dense round size=sm aria-label='Close the status bar'").classes("close")
        self.strip.set_visibility(False)

    def say(self, words: str, command: str = "", *, wrong: bool = False) -> None:
        """Show a sentence, and the command if there is one."""
        self.words.set_text(words)
        self.words.classes(add="wrong" if wrong else "", remove="" if wrong else "wrong")
        self.command.set_text(command)
        self.command.set_visibility(bool(command))
        self.strip.set_visibility(True)


class Page:
    """One page being shown."""

    def __init__(self, site: Site, status: StatusBar) -> None:
        self.site, self.status = site, status
        self.beginning = False
        """Is a job being started? A second click starts no second one."""
        self.refresh: Callable[[], Any] = lambda: None
        """Shows what there is now; each page sets its own."""
        # Not where the button is: that may be drawn again while a question is open.
        self._place = ui.element("div")

    @contextmanager
    def dialog(self) -> Iterator[ui.dialog]:
        """A dialog; what is made within the block is in it."""
        with self._place, ui.dialog() as dialog, ui.card().classes("dialog"):
            yield dialog

    def go(self, path: str) -> None:
        """Show another page."""
        with self._place:
            ui.navigate.to(path)

    async def do(self, action: Action[...], **arguments: Any) -> Outcome[Done]:
        """Call an action, show what there is now, and say what was done with its command; or the sentence why not.

        What needs torch is done where brains are: the page's own process stays small.
        """
        root = self.site.root
        heavy = await in_thread(action.is_heavy, root, arguments)
        if heavy.value:
            self.status.say("Working; this takes some seconds.")
            outcome = await ask_worker(self.site, "run", command_of(action), arguments)
        else:
            outcome = await in_thread(action.run, root, arguments)
        self.refresh()
        sentence = outcome.value.sentence if outcome.value else outcome.error
        self.status.say(sentence, self.site.command_line(action, **arguments), wrong=bool(outcome.error))
        return outcome

    async def confirm(self, question: str, yes: str, command: str = "") -> bool:
        """Ask before something that cannot be undone."""
        with self.dialog() as dialog:
            ui.label(question)
            if command:
                ui.label(command).classes("command")
            with ui.element("div").classes("line"):
                ui.button(yes, color="negative", on_click=lambda: dialog.submit(True))
                ui.button("Keep", on_click=lambda: dialog.submit(False)).props("flat autofocus")
        answer = await dialog
        close(dialog)
        return bool(answer)


def close(dialog: ui.dialog) -> None:
    """Done with a dialog; its page may be gone before."""
    with suppress(ValueError):
        dialog.delete()


@contextmanager
def framed(site: Site, title: str, place: str) -> Iterator[Page]:
    """A page with header and navigation; what is made within the block is its content."""
    ui.page_title(f"{title} - Subbrains Manager")
    ui.add_css(STYLE)
    ui.colors(primary="#0b5394", negative="#a4001d")
    with ui.header(elevated=False).classes("top"):
        ui.label("Subbrains Manager").classes("brand")
        with ui.element("nav").props('aria-label="Pages"'):
            for name, target in PLACES.items():
                link = ui.link(name, target)
                if name == place:
                    link.props('aria-current="page"')
    with ui.element("div").classes("sheet"):
        yield Page(site, StatusBar())


def heading(text: str, level: int = 1) -> None:
    """A heading, as text."""
    with ui.element(f"h{level}"):
        ui.label(text)


def facts(rows: dict[str, str]) -> None:
    """Names and values; empty ones are left out."""
    with ui.element("div").classes("facts"):
        for name, value in rows.items():
            if value:
                ui.label(name)
                ui.label(value)


def begin_here(site: Site, words: str) -> None:
    """Say that there is no brain yet, and what to do first."""
    if (Workspace(site.root).base_model / "config.json").is_file():
        empty(f"{words} Train a brain first.", site.command("train", "--name", "small"))
    else:
        empty(f"{words} First of all the workspace wants a tokenizer and text.", site.command("init"))


def empty(words: str, command: str = "") -> None:
    """Say that there is nothing yet, and what to do first."""
    with ui.element("div").classes("panel"):
        ui.label(words)
        if command:
            ui.label(command).classes("command")
