"""What all pages share: the frame with its navigation, and doing things with their command and their errors told."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from nicegui import run, ui

from aios.manager.brain import Brain
from aios.manager.jobs import Jobs
from aios.manager.runs import Runs
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
    brain: Brain = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "jobs", Jobs(self.root))
        object.__setattr__(self, "runs", Runs(self.root))
        object.__setattr__(self, "brain", Brain(self.root))

    @property
    def here(self) -> list[str]:
        """Words that tell a command which workspace is meant."""
        return [] if self.root == Path() else [f"--root={self.root}"]

    def command(self, *words: str) -> str:
        """The ``aios`` command that does the same."""
        return Workspace(self.root).command(*words)


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What a function gave, or the sentence it failed with."""

    value: Value | None = None
    error: str = ""


def attempt(function: Callable[..., Value], *arguments: Any, **options: Any) -> Outcome[Value]:
    """Call it; whatever it raises becomes the sentence the command line would print."""
    try:
        return Outcome(function(*arguments, **options))
    except Exception as error:
        return Outcome(error=sentence(error))


async def aside(function: Callable[..., Value], *arguments: Any, **options: Any) -> Outcome[Value]:
    """Call it in a thread: the page stays alive meanwhile."""
    return await run.io_bound(attempt, function, *arguments, **options) or Outcome(error="the page is being closed.")


async def ask_brain(site: Site, verb: str, *given: Any, **arguments: Any) -> Outcome[Any]:
    """Ask the process that runs brains; questions that wait for each other keep no page waiting."""
    question = partial(attempt, site.brain.ask, verb, *given, **arguments)
    return await asyncio.get_running_loop().run_in_executor(site.brain.threads, question)


class Told:
    """The strip at the bottom: what was done last, and the command that does the same."""

    def __init__(self) -> None:
        with ui.element("div").classes("told").props('role="status" aria-live="polite"') as self.strip:
            self.words = ui.label().classes("sentence")
            self.command = ui.label().classes("command")
            close = ui.button(icon="close", on_click=lambda: self.strip.set_visibility(False))
            close.props("flat dense round size=sm aria-label='Close what was told'").classes("close")
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

    def __init__(self, site: Site, told: Told) -> None:
        self.site, self.told = site, told
        self.beginning = False
        """Is a job being started? A second click starts no second one."""
        self.refresh: Callable[[], Any] = lambda: None
        """Shows what there is now; each page sets its own."""
        # Not where the button is: that part may be drawn anew while a question is open.
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

    async def do(
        self,
        words: str,
        command: tuple[str, ...],
        function: Callable[..., Any],
        *arguments: Any,
        heavy: bool = False,
        **options: Any,
    ) -> Outcome[Any]:
        """Do something, show what there is now, and tell it with its command; or the sentence why not.

        What is ``heavy`` needs torch, and is done where brains are: the page's own process stays small.
        """
        if heavy:
            self.told.say("Working; this takes some seconds.")
            outcome = await ask_brain(self.site, "call", partial(function, *arguments, **options))
        else:
            outcome = await aside(function, *arguments, **options)
        self.refresh()
        self.told.say(outcome.error or words, self.site.command(*command), wrong=bool(outcome.error))
        return outcome

    async def sure(self, question: str, command: tuple[str, ...], yes: str) -> bool:
        """Ask before something that cannot be undone."""
        with self.dialog() as dialog:
            ui.label(question)
            if command:
                ui.label(self.site.command(*command)).classes("command")
            with ui.element("div").classes("line"):
                ui.button(yes, color="negative", on_click=lambda: dialog.submit(True))
                ui.button("Keep", on_click=lambda: dialog.submit(False)).props("flat autofocus")
        answer = await dialog
        put_away(dialog)
        return bool(answer)


def put_away(dialog: ui.dialog) -> None:
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
        told = Told()
        yield Page(site, told)


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
