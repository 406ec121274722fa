"""The page of chat: a brain goes on with what is said, piece by piece."""

import dataclasses
from threading import Event
from typing import Any

from nicegui import ui

from aios.actions import talk
from aios.brains.families import FAMILIES
from aios.manager.brain_forms import LONGEST, GoalForm, choose_brain
from aios.manager.frame import Page, Site, ask_worker, framed, heading, try_call
from aios.manager.jobs_page import as_number
from aios.settings.sampling import Sampling

_FIELDS = {
    "temperature": ("Temperature", 0.1),
    "top_p": ("Top-p", 0.05),
    "top_k": ("Top-k (0: all)", 1),
    "max_new_tokens": ("Most tokens", 10),
    "seed": ("Seed", 1),
}
"""Label and step. No bounds: a field with bounds changes what was typed, and says nothing."""


def add_to(site: Site) -> None:
    """Add the page."""

    @ui.page("/chat")
    def chat() -> None:
        with framed(site, "Chat", "Chat") as page:
            heading("Chat")
            _Chat(page)


class _Chat:
    """One talk; it is the page's own and gone with it."""

    def __init__(self, page: Page) -> None:
        self.page, self.text, self.turn = page, "", 0
        self.stop = Event()
        with ui.element("div").classes("panel") as form:
            with ui.element("div").classes("line"):
                brain = choose_brain(page, self._new)
                if brain is None:
                    form.classes(remove="panel")
                    return
                self.brain, self.goals = brain, GoalForm(page)
            with ui.element("div").classes("line"):
                usual = Sampling()
                self.sampling = {
                    name: ui.number(label, value=getattr(usual, name), step=step)
                    for name, (label, step) in _FIELDS.items()
                }
                self.halt = ui.select(["exact", "max"], label="Halting", value="exact")
                self.segments = ui.number("Most segments", step=1).props("clearable")
                for one in (*self.sampling.values(), self.halt, self.segments):
                    one.props("dense outlined").style("width: 130px")
        self.talk = ui.element("div").classes("stack").props('role="log" aria-label="Talk"')
        with ui.element("div").classes("panel"):
            self.said = ui.textarea("Say something").props(f"outlined autogrow maxlength={LONGEST}")
            with ui.element("div").classes("line"):
                self.send = ui.button("Send", on_click=self._send)
                self.stopping = ui.button("Stop", color="negative", on_click=lambda: self.stop.set()).props("outline")
                ui.button("New talk", on_click=self._new).props("outline")
                ui.label("The brain continues the text so far, yours included.").classes("soft")
        self._show_halting()
        self.stopping.disable()
        ui.context.client.on_delete(lambda: self.stop.set())

    def _show_halting(self) -> None:
        for one in (self.halt, self.segments):
            one.set_visibility(self._halts())

    def _new(self) -> None:
        self.stop.set()
        self.stop = Event()  # what still runs has the other one
        self.text, self.turn = "", 0
        self.talk.clear()
        self._show_halting()

    def _sampling(self) -> Sampling:
        usual = Sampling()
        values: dict[str, Any] = {
            name: as_number(name, field.value, isinstance(getattr(usual, name), int))
            for name, field in self.sampling.items()
            if field.value is not None
        }
        if self._halts():
            most = self.segments.value
            values |= {"halt": self.halt.value, "segments": None if most is None else as_number("segments", most, True)}
        return Sampling(**values)

    def _halts(self) -> bool:
        return FAMILIES[str(self.brain.value).partition("/")[0]].halts

    async def _send(self) -> None:
        said = (self.said.value or "")[:LONGEST]
        outcome = try_call(lambda: (self._sampling(), self.goals.flags()))
        if not said.strip() or outcome.value is None:
            self.page.status.say(outcome.error or "Say something first.", wrong=True)
            return
        sampling, flags = outcome.value
        command = self.page.site.command_line(talk.chat, name=self.brain.value, sampling=sampling, goals=flags)
        sampling = dataclasses.replace(sampling, seed=sampling.seed + self.turn)
        with self.talk:
            ui.label(said).classes("panel talk you")
            with ui.element("div").classes("panel"):
                answer = ui.label().classes("talk")
                note = ui.label("The brain is reading.").classes("soft talk")
        self.said.set_value("")
        self.send.disable()
        self.stopping.enable()
        pieces: list[str] = []
        follow = ui.timer(0.1, lambda: answer.set_text("".join(pieces)))
        stop = self.stop
        stop.clear()
        question = {"text": f"{self.text}{said}\n", "flags": flags, "sampling": sampling}
        done = await ask_worker(self.page.site, "chat", self.brain.value, **question, piece=pieces.append, stop=stop)
        follow.cancel()
        self.send.enable()
        self.stopping.disable()
        answer.set_text("".join(pieces))
        if done.value is None:
            note.set_text(done.error)
            note.classes(add="wrong", remove="soft")
            self.page.status.say(done.error, command, wrong=True)
            return
        if stop is self.stop:
            self.text, self.turn = done.value["text"], self.turn + 1
        tokens, seconds = done.value["tokens"], done.value["seconds"]
        speed = f"{tokens} tokens{', stopped' * done.value['stopped']}, {tokens / max(seconds, 1e-9):.1f} tokens/s"
        note.set_text("\n".join([speed, *done.value["lines"]]))
        self.page.status.say(speed, command)
