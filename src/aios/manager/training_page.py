"""The page of training: every run found, its curves while they grow, stopping it, and another run to compare."""

import os
import time
from pathlib import PurePosixPath
from typing import Any

from nicegui import ui

from aios.brains.brain import METRICS
from aios.manager import charts, expert_forms, run_form
from aios.manager.frame import Page, Site, begin_here, framed, heading, in_thread, try_call
from aios.manager.runs import RunLog, RunSummary

EVERY = 5.0
"""Seconds between two readings of the run."""
_LIST, _POINTS = 2, 50
"""Readings from one list of runs to the next; and points for which charts wait one more, up to a line's most.

A browser takes a quarter of a second for charts of all points, and what is added to them hardly shows.
"""
_ENDED = 10.0
"""Seconds after its last record for which another process may write a run whose job has ended."""


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
        found = try_call(self._names)
        if found.error:
            ui.label(found.error).classes("wrong")
        names = found.value or {}
        if not names:
            begin_here(self.site, "No run yet; the curves of one appear here while it trains.")
            ui.link("Train an expert", "/jobs#train")
            self.run = ""
            ui.timer(EVERY, self._await_first)
            return
        for path in (run, other):
            if path and path not in names:
                ui.label(f"There is no run {path!r} in this workspace, or it has written nothing yet.")
        if run and run not in names:  # never another one in its place: its buttons act
            chosen = ui.select(names, label="Run", on_change=lambda event: _go(event.value, ""))
            chosen.props("dense outlined")
            self.run = run
            ui.timer(EVERY, self._await_first)
            return
        self.run = run or next(iter(names))
        self.other = other if other in names and other != self.run else ""
        self.layer = 0
        places = [PurePosixPath(path.removesuffix(f"/{METRICS}")) for path in (self.run, self.other) if path]
        shared = os.path.commonpath([place.parent for place in places])
        self.labels = [str(place.relative_to(shared)) for place in places]
        with ui.element("div").classes("line"):
            chosen = ui.select(names, label="Run", value=self.run).props("dense outlined").classes("grow")
            others = {"": "nothing"} | {path: name for path, name in names.items() if path != self.run}
            second = ui.select(others, label="Compare with", value=self.other).props("dense outlined").classes("grow")
            chosen.on_value_change(lambda event: _go(event.value, ""))
            second.on_value_change(lambda event: _go(self.run, event.value))
            self.chosen, self.second = chosen, second
        with ui.element("div").classes("spread"):
            self.words = ui.label().classes("soft")
            self.stop = ui.button("Stop this run", color="negative", on_click=self._stop).props("outline")
            self.resume = ui.button("Resume this run", on_click=self._resume).props("outline")
            for one in (self.stop, self.resume):
                one.set_visibility(False)
        with ui.element("div").classes("two"):
            self.lines = {name: self._chart(name, label) for name, label in charts.LINES.items()}
        self.layers = ui.select([0], label="Layer", value=0, on_change=self._turn).props("dense outlined")
        self.layers.style("width: 120px")
        with ui.element("div").classes("two"):
            whose = f", {self.labels[0]}" if self.other else ""
            self.heat = {name: self._chart(name, label + whose) for name, label in charts.HEAT.items()}
        if brain := run_form.brain_of(self.run):
            slots = ui.refreshable(expert_forms.slots_of)
            slots(page, "/".join(brain))
            page.refresh = slots.refresh
        self.drawn: Any = None
        self.drawn_step = 0
        self.readings, self.waited, self.names = 0, 0, names
        ui.timer(0.05, self._refresh, once=True)
        ui.timer(EVERY, self._refresh)

    def _names(self) -> dict[str, str]:
        return {one.path: self._name(one) for one in self.site.runs.all()}

    async def _await_first(self) -> None:
        found = (await in_thread(self._names)).value or {}
        if self.run in found or (found and not self.run):
            ui.navigate.reload()

    def _name(self, one: RunSummary) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.changed))
        return f"{one.name}: step {one.step:,}, {when}"

    def _chart(self, name: str, label: str) -> tuple[Any, ui.echart]:
        with ui.element("div").classes("panel") as panel:
            heading(label, 2)
            chart = ui.echart({}).classes("chart").props('role="img"')
            chart.props["aria-label"] = label  # it may hold the name of a folder
            return panel, chart

    async def _refresh(self) -> None:
        self.readings += 1
        outcome = await in_thread(self._read)
        if outcome.value is None:
            self.words.set_text(outcome.error)
            return
        logs, live, stoppable, resumable = outcome.value
        running = stoppable or live
        if self.names != self.chosen.options and self.run in self.names:
            self.chosen.set_options(self.names, value=self.run)
            others = {path: name for path, name in self.names.items() if path != self.run}
            self.second.set_options({"": "nothing"} | others)
        step = logs[0].last.get("step")
        facts = [f"step {step:,}" if step is not None else "no training step recorded yet"]
        facts += [f"loss {logs[0].last['loss']:.4f}"] if "loss" in logs[0].last else []
        facts += [f"dead experts {logs[0].last['dead_experts']}"] if "dead_experts" in logs[0].last else []
        facts += [f"health masks expert {expert} of layer {layer}" for layer, expert in logs[0].masked]
        ended = bool((logs[0].final or {}).get("trained"))
        facts += ["running"] if running else ["finished"] if ended else ["stopped"] if resumable else []
        self.stop.set_visibility(stoppable)
        self.resume.set_visibility(resumable)
        mark = [(log.offset, log.identity) for log in logs], self.layer
        turned = self.drawn is None or mark[1] != self.drawn[1]
        growing = running or any(log.live for log in logs)
        self.waited += 1
        wait = max(len(log.train.records) for log in logs) // _POINTS if growing and not turned else 0
        behind = mark != self.drawn
        if late := behind and self.waited <= wait:
            facts.append(f"charts up to step {self.drawn_step:,}")
        self.words.set_text(", ".join(facts))
        if late or not behind:
            return
        self.waited = 0
        self._draw(logs)
        self.drawn, self.drawn_step = mark, step or 0

    def _read(self) -> tuple[list[RunLog], bool, bool, bool]:
        logs = [self.site.runs.follow(path) for path in (self.run, self.other) if path]
        if self.readings % _LIST == 0:
            self.names = self._names()
        jobs = [job for job in self.site.jobs.all() if job.metrics == self.run]
        one, working = logs[0], any(job.alive for job in jobs)
        # A run whose job is known to have ended is not live, unless somebody else writes on.
        live = one.live and (working or not jobs or time.time() - one.changed < _ENDED)
        stoppable = working or (live and run_form.stop_file(self.site, self.run) is not None)
        unfinished = not working and not live and not (one.final or {}).get("trained")
        return logs, live, stoppable, unfinished and run_form.brain_of(self.run) is not None

    def _draw(self, logs: list[RunLog]) -> None:
        for name, (panel, chart) in self.lines.items():
            options = charts.lines(name, list(zip(self.labels, logs, strict=True)))
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
        if not await self.page.confirm("Stop this run? It saves first; --resume goes on.", "Stop"):
            return

        outcome = await in_thread(run_form.stop, self.site, self.run)
        self.page.status.say(outcome.error or str(outcome.value), wrong=bool(outcome.error))

    async def _resume(self) -> None:
        if error := await run_form.resume(self.page, self.run):
            self.page.status.say(error, wrong=True)


def _put(chart: ui.echart, options: dict[str, Any]) -> None:
    chart.options.clear()
    chart.options.update(options)
    chart.update()


def _go(run: str, other: str) -> None:
    from urllib.parse import urlencode

    ui.navigate.to("/training?" + urlencode({"run": run} | ({"other": other} if other else {})))
