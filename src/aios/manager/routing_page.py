"""The page of routing: which experts take each token of a text, goals off and on."""

from typing import Any

from nicegui import ui

from aios.manager.brain_forms import GoalForm, TextForm, choose_brain, explain_line
from aios.manager.frame import Page, Site, ask_worker, framed, heading, try_call
from aios.manager.tokens import MOVE, changed, shares_html, tokens_html


def add_to(site: Site) -> None:
    """Add the page."""

    @ui.page("/routing")
    def routing() -> None:
        with framed(site, "Routing", "Routing") as page:
            heading("Routing")
            _Routing(page)


class _Routing:
    """A form, and what came of it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.found: dict[str, Any] = {}
        with ui.element("div").classes("panel") as form:
            with ui.element("div").classes("line"):
                brain = choose_brain(page)
                if brain is None:
                    form.classes(remove="panel")
                    return
                self.brain, self.text = brain, TextForm(page, brain)
            self.text.field()
            with ui.element("div").classes("line"):
                self.goals = GoalForm(page)
            with ui.element("div").classes("line"):
                self.button = ui.button("Inspect", on_click=self._inspect)
                self.words = ui.label("Which experts take each token, layer by layer.").classes("soft")
                self.words.props('role="status"')
        with ui.element("div").classes("line") as self.choices:
            self.layer = ui.select([0], label="Layer", value=0, on_change=self._show).props("dense outlined")
            self.segment = ui.select({-1: "each token's last"}, label="Segment", value=-1, on_change=self._inspect)
            self.segment.props("dense outlined")
            for one in (self.layer, self.segment):
                one.style("width: 180px")
        self.result = ui.element("div").classes("stack")
        self.choices.set_visibility(False)
        brain.on_value_change(self._forget)

    def _forget(self) -> None:
        self.found = {}
        self.segment.set_options({-1: "each token's last"}, value=-1)
        self.choices.set_visibility(False)
        self.result.clear()

    async def _inspect(self) -> None:
        if not self.text.value.strip():
            self.page.status.say("Type a text first, or take held-out text.", wrong=True)
            return
        flags = try_call(self.goals.flags)
        if flags.value is None:
            self.page.status.say(flags.error, wrong=True)
            return
        brain, segment = self.brain.value, None if self.segment.value == -1 else self.segment.value
        text = self.text.value
        self.button.disable()
        self.words.set_text("Working; a brain that is not loaded yet takes some seconds.")
        question = {"text": text, "flags": flags.value, "segment": segment}
        outcome = await ask_worker(self.page.site, "inspect", brain, **question)
        self.button.enable()
        if brain != self.brain.value:
            self.words.set_text("")
            return  # it is of a brain that is shown no more
        command = explain_line(self.page.site, brain, text, flags.value)
        if outcome.value is None:
            self.words.set_text("")
            self.page.status.say(outcome.error, command, wrong=True)
            return
        self.found, self.with_goals = outcome.value, flags.value.any
        cut = " The brain reads no more of it." if self.found["tokens"] >= self.found["room"] else ""
        self.words.set_text(f"{self.found['tokens']:,} tokens.{cut}")
        self.page.status.say(
            "; ".join(map(str.strip, self.found["lines"])) if self.with_goals else "No goal is on.", command
        )
        layers = dict(enumerate(self.found["layers"]))
        self.layer.set_options(layers, value=self.layer.value if self.layer.value in layers else 0)
        segments = {-1: "each token's last"} | {at: str(at + 1) for at in range(self.found["max_segments"])}
        self.segment.set_options(segments)
        self.segment.set_visibility(len(segments) > 2)
        self.choices.set_visibility(True)
        self._show()

    def _show(self) -> None:
        if not self.found:
            return
        layer, off, on = self.layer.value, self.found["off"], self.found["on"]
        self.result.clear()
        with self.result:
            with ui.element("div").classes("two"):
                _tokens("Goals off", tokens_html(self.found["pieces"], off, layer))
                if self.with_goals:
                    count = sum(changed(off, on, layer))
                    title = f"Goals on: {count} of {self.found['tokens']} tokens changed"
                    _tokens(title, tokens_html(self.found["pieces"], on, layer, off))
            with ui.element("div").classes("panel"):
                heading("Shares of this layer", 2)
                ui.label(
                    "A token has the colour of the expert with most weight; a line above: an attached expert is open; "
                    "a frame: goals changed it. Domains are the brain's own data, goals off."
                ).classes("soft")
                with ui.element("div").classes("scroll").props('tabindex="0" role="region" aria-label="Shares"'):
                    ui.html(shares_html(self.found, layer, self.with_goals), tag="table", sanitize=False).classes(
                        "shares"
                    )
                if not self.found["domains"]:
                    ui.label("The data this brain was trained on is gone, so there are no domains to show.").classes(
                        "soft"
                    )


def _tokens(title: str, html: str) -> None:
    with ui.element("div").classes("panel tokens"):
        heading(title, 2)
        flow = ui.html(html, sanitize=False).classes("flow").props(f'role="listbox" aria-label="{title}"')
        flow.on("keydown", js_handler=MOVE)
        ui.label("Point at a token, or walk with the arrow keys.").classes("soft")
