"""The page of training: every run found, its curves while they grow, stopping it, and another run to compare."""

import time
from typing import Any

from nicegui import ui

from aios.manager import charts, expert_forms, run_form
from aios.manager.frame import Page, Site, aside, attempt, empty, framed, heading
from aios.manager.runs import RunLog, RunSummary

EVERY = 2.0


def add_to(site: Site) -> None:
    """Add the page."""

    @ui.page("/training")
    def training(run: str = "", other: str = "") -> None:
        with framed(site, "Training", "Training") as page:
            _Training(page, run, other)


class _Training:
    """One run, or two."""

    def __init__(self, page: Page, run: str, other: str) -> None:
        self.page, self.site = page, page.site
        with ui.element("div").classes("spread"):
            heading("Training")
            ui.button("New run", on_click=lambda: ui.navigate.to("/training/new"))
        runs = attempt(self.site.runs.all).value or []
        if not runs:
            empty(
                "No run yet. Start one, and its curves appear here while it trains.",
                self.site.command("train", "--config", "run.toml"),
            )
            ui.link("Train an expert", "/jobs#train")
            return
        names = {one.path: self._name(one) for one in runs}
        for asked in (run, other):
            if asked and asked not in names:
                ui.label(f"There is no run {asked!r} in this workspace.").classes("wrong")
        self.run = run if run in names else runs[0].path
        self.other = other if other in names and other != self.run else ""
        self.layer = 0
        with ui.element("div").classes("line"):
            chosen = ui.select(names, label="Run", value=self.run).props("dense outlined").classes("grow")
            others = {"": "nothing"} | {path: name for path, name in names.items() if path != self.run}
            second = ui.select(others, label="Compare with", value=self.other).props("dense outlined").classes("grow")
            chosen.on_value_change(lambda event: _go(event.value, ""))
            second.on_value_change(lambda event: _go(self.run, event.value))
        with ui.element("div").classes("spread"):
            self.words = ui.label().classes("soft")
            self.stop = ui.button("Stop this run", color="negative", on_click=self._stop).props("outline")
            self.resume = ui.button("Resume this run", on_click=self._resume).props("outline")
        with ui.element("div").classes("two"):
            self.lines = {name: self._chart(name, label) for name, label in charts.LINES.items()}
        self.layers = ui.select([0], label="Layer", value=0, on_change=self._turn).props("dense outlined")
        self.layers.style("width: 120px")
        with ui.element("div").classes("two"):
            self.heat = {name: self._chart(name, label) for name, label in charts.HEAT.items()}
        if brain := run_form.brain_of(self.run):
            slots = ui.refreshable(expert_forms.slots_of)
            slots(page, "/".join(brain))
            page.refresh = slots.refresh
        self.drawn: Any = None
        ui.timer(0.05, self._look, once=True)
        ui.timer(EVERY, self._look)

    def _name(self, one: RunSummary) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.changed))
        return f"{one.name}: step {one.step:,}, {when}"

    def _chart(self, name: str, label: str) -> tuple[Any, ui.echart]:
        with ui.element("div").classes("panel") as panel:
            heading(label, 2)
            return panel, ui.echart({}).classes("chart").props(f'role="img" aria-label="{label}"')

    async def _look(self) -> None:
        outcome = await aside(self._read)
        if outcome.value is None:
            self.words.set_text(outcome.error)
            return
        logs, stoppable, resumable = outcome.value
        step = logs[0].last.get("step")
        told = [f"step {step:,}" if step is not None else "no training step recorded yet"]
        told += [f"loss {logs[0].last['loss']:.4f}"] if "loss" in logs[0].last else []
        told += [f"dead experts {logs[0].last['dead_experts']}"] if "dead_experts" in logs[0].last else []
        told += ["running"] if stoppable or logs[0].live else ["stopped"] if resumable else []
        self.words.set_text(", ".join(told))
        self.stop.set_visibility(stoppable)
        self.resume.set_visibility(resumable)
        mark = [(log.offset, log.identity) for log in logs], self.layer
        if mark == self.drawn:
            return
        self.drawn = mark
        self._draw(logs)

    def _read(self) -> tuple[list[RunLog], bool, bool]:
        logs = [self.site.runs.follow(path) for path in (self.run, self.other) if path]
        job, brain, one = self.site.jobs.of_run(self.run), run_form.brain_of(self.run), logs[0]
        stoppable = job is not None or (one.live and run_form.stop_file(self.site, self.run) is not None)
        unfinished = job is None and not one.live and not (one.final or {}).get("trained")
        return logs, stoppable, unfinished and brain is not None

    def _draw(self, logs: list[RunLog]) -> None:
        names = [
            path.removeprefix("artifacts/").removesuffix("/metrics.jsonl") for path in (self.run, self.other) if path
        ]
        for name, (panel, chart) in self.lines.items():
            options = charts.lines(name, list(zip(names, logs, strict=True)))
            panel.set_visibility(options is not None)
            if options is not None:
                _put(chart, options)
        layers = max((logs[0].layers(name) for name in charts.HEAT), default=0)
        self.layers.set_visibility(layers > 1)
        if layers and len(self.layers.options) != layers:
            self.layers.set_options(list(range(layers)), value=min(self.layer, layers - 1))
        for name, (panel, chart) in self.heat.items():
            options = charts.heat(name, logs[0], self.layer)
            panel.set_visibility(options is not None)
            if options is not None:
                _put(chart, options)

    def _turn(self, event: Any) -> None:
        self.layer = int(event.value or 0)

    async def _stop(self) -> None:
        if not await self.page.sure("Stop this run? It saves first; --resume goes on.", (), "Stop"):
            return

        outcome = await aside(run_form.stop, self.site, self.run)
        self.page.told.say(outcome.error or str(outcome.value), wrong=bool(outcome.error))

    async def _resume(self) -> None:
        if error := await run_form.resume(self.page, self.run):
            self.page.told.say(error, wrong=True)


def _put(chart: ui.echart, options: dict[str, Any]) -> None:
    chart.options.clear()
    chart.options.update(options)
    chart.update()


def _go(run: str, other: str) -> None:
    from urllib.parse import urlencode

    ui.navigate.to("/training?" + urlencode({"run": run} | ({"other": other} if other else {})))
