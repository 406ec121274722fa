"""The page of jobs: what runs, its log, stopping it; and the form that trains an expert."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

from nicegui import ui

from aios.actions import experts
from aios.actions.table import words_of
from aios.brains.brain import METRICS, Brain
from aios.brains.run_file import RUN_FILE, RunFile
from aios.manager.frame import Page, Site, begin_here, empty, facts, framed, heading, in_thread, try_call
from aios.manager.jobs import Job
from aios.settings.expert import ExpertTraining
from aios.workspace import plain_name
from chronomoe.errors import ConfigError

EVERY = 1.0
_BASIC = ("steps", "batch_size", "max_seq_len", "lr", "seed", "eval_tokens", "calibration_windows")


def add_to(site: Site) -> None:
    """Add the pages."""

    @ui.page("/jobs")
    def jobs(expert: str = "") -> None:
        with framed(site, "Jobs", "Jobs") as page:
            heading("Jobs")
            _List(page)
            _train_form(page, expert)

    @ui.page("/jobs/{job_id}")
    def job(job_id: str) -> None:
        with framed(site, "Job", "Jobs") as page:
            _One(page, job_id)


class _List:
    """All jobs, read every second."""

    def __init__(self, page: Page) -> None:
        self.page, self.seen = page, None
        self.content = ui.element("div").style("display: contents")
        self._show(page.site.jobs.all())
        ui.timer(EVERY, self._refresh)

    async def _refresh(self) -> None:
        outcome = await in_thread(self.page.site.jobs.all)
        if outcome.value is not None:
            self._show(outcome.value)

    def _show(self, jobs: list[Job]) -> None:
        now: Any = [(job.id, job.state) for job in jobs]
        if now == self.seen:
            return
        self.seen = now
        self.content.clear()
        with self.content:
            if not jobs:
                empty("No job yet. Train an expert below; whatever is started here goes on when the page is closed.")
                return
            columns = [
                {"name": name, "label": label, "field": name, "align": "left", "classes": wide, "headerClasses": wide}
                for name, label, wide in (("title", "Job", ""), ("state", "State", ""), ("began", "Began", "wide"))
            ]
            rows = [{"id": job.id, "title": job.title, "state": job.state, "began": _when(job.created)} for job in jobs]
            with ui.element("div").classes("panel"):
                table = ui.table(columns=columns, rows=rows, row_key="id", pagination={"rowsPerPage": 15})
                table.props("flat dense")
                table.add_slot(
                    "body-cell-title",
                    """<q-td :props="props"><a :href="'/jobs/' + props.row.id">{{ props.row.title }}</a></q-td>""",
                )
                if len(rows) <= 15:
                    table.props("hide-bottom")


class _One:
    """One job: its command, progress and log."""

    def __init__(self, page: Page, job_id: str) -> None:
        self.page, self.id = page, job_id
        outcome = try_call(page.site.jobs.get, job_id)
        if outcome.value is None:
            heading("No such job")
            ui.label(outcome.error)
            ui.link("All jobs", "/jobs")
            return
        job = outcome.value
        with ui.element("div").classes("spread"):
            heading(job.title)
            with ui.element("div").classes("line"):
                self.state = ui.label(job.state).classes("mark")
                self.stop = ui.button("Stop", color="negative", on_click=self._stop).props("outline")
        with ui.element("div").classes("panel"):
            facts({"Began": _when(job.created), "Folder": str(job.folder.relative_to(page.site.root))})
            ui.label(job.command).classes("command")
            self.progress = ui.linear_progress(0, show_value=False).props('aria-label="Progress"')
            self.words = ui.label().classes("soft")
            if job.metrics:
                ui.link("Its curves", f"/training?run={job.metrics}")
        with ui.element("div").classes("panel"):
            heading("Log", 2)
            self.log = ui.label().classes("log").props('tabindex="0"')
        self._show(job, page.site.jobs.log(job_id), _steps(page.site, job))
        self.timer = ui.timer(EVERY, self._refresh)

    async def _refresh(self) -> None:
        jobs = self.page.site.jobs
        outcome = await in_thread(lambda: (job := jobs.get(self.id), jobs.log(self.id), _steps(self.page.site, job)))
        if outcome.value is None:
            self.page.status.say(outcome.error, wrong=True)
            self.timer.deactivate()
            return
        self._show(*outcome.value)

    def _show(self, job: Job, log: str, done: tuple[int, int]) -> None:
        self.state.set_text(job.state + ("" if job.code in (None, 0, 130) else f", exit code {job.code}"))
        self.stop.set_visibility(job.alive)
        self.log.set_text(log or "Nothing yet.")
        step, total = done
        finished = job.state == "done"
        self.progress.set_value(1.0 if finished else step / total if total else 0.0)
        self.words.set_text(f"step {step:,} of {total:,}" if step and total else "")
        if not job.alive and hasattr(self, "timer"):
            self.timer.deactivate()

    async def _stop(self) -> None:
        if await self.page.confirm("Stop this job? Training saves first, where it can.", "Stop"):
            outcome = await in_thread(self.page.site.jobs.cancel, self.id)
            self.page.status.say(outcome.error or "Asked it to stop.", wrong=bool(outcome.error))


def _steps(site: Site, job: Job) -> tuple[int, int]:
    """Steps done since the job began, and in all, where its metrics tell."""
    words = [word.partition("=") for word in job.words]
    total = next((int(value) for name, _, value in words if name in ("--steps", "--max-steps") and value.isdigit()), 0)
    file = site.root / job.metrics
    if not total:  # a resumed run has its own settings
        saved = try_call(RunFile.of, file.with_name(RUN_FILE)).value
        total = 0 if saved is None else saved.run.resolved().max_steps or 0
    if not job.metrics or not file.is_file() or file.stat().st_mtime < job.created:
        return 0, total
    return next((one.step for one in site.runs.all() if one.path == job.metrics), 0), total


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def inside(site: Site, path: str) -> Path:
    """A path typed from the workspace's root; :class:`ConfigError` if it leads out of it or to nothing."""
    place = site.root / path.strip()
    if not path.strip() or "\0" in path or not place.resolve().is_relative_to(site.root.resolve()):
        raise ConfigError(f"{path!r} is not in this workspace; give a path inside {site.root.resolve()}.")
    if not place.exists():
        raise ConfigError(f"there is no {place}.")
    return place


def as_number(name: str, value: Any, integral: bool) -> float:
    """What was typed as a number; :class:`ConfigError` if it should be a whole number and is not, or is above 1e15."""
    number, name = float(value), name.replace("_", " ").replace("-", " ")
    if abs(number) > 1e15:
        raise ConfigError(f"{name} is {number:g}; use a smaller number.")
    if not number.is_integer():
        if integral:
            raise ConfigError(f"{name} is {number}; it must be a whole number.")
        return number
    return int(number)


def expert_words(site: Site, expert: str, brain: str, text: str, goal: str, numbers: dict[str, Any]) -> list[str]:
    """Words of the command that trains an expert, all of them checked; raises :class:`ConfigError`."""
    plain_name(expert)
    if brain not in Brain.names(site.root):
        raise ConfigError(f"there is no brain {brain!r} in this workspace.")
    given = {name: as_number(name, value, name != "lr") for name, value in numbers.items() if value is not None}
    settings: dict[str, Any] = {"dataset_file": inside(site, text), "default_goal": goal or None, **given}
    call = {"expert": expert, "settings": ExpertTraining(brain=brain, **settings)}
    return [*words_of(experts.train, call), *site.here]


async def begin(page: Page, title: str, words: list[str], *, kind: str, metrics: str) -> str:
    """Start a job on a run and show it; returns the sentence why not, or nothing if one is being started."""
    if page.beginning:
        return ""
    page.beginning, started = True, False
    try:
        busy = await in_thread(page.site.jobs.of_run, metrics)
        if busy.value is not None:
            return f"job {busy.value.id} is at work on it already."
        begun = await in_thread(page.site.jobs.start, title, words, kind=kind, metrics=metrics)
        if begun.value is None:
            return begun.error
        started = True  # the page goes on to the job, and coming back makes a new page
        page.go(f"/jobs/{begun.value.id}")
        return ""
    finally:
        page.beginning = started


def _train_form(page: Page, expert: str) -> None:
    site, brains = page.site, Brain.names(page.site.root)
    default: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(ExpertTraining)}
    if not brains:
        begin_here(site, "There is no brain to train an expert in yet.")
        return
    with ui.element("section").classes("panel").props('id="train"'):
        heading("Train an expert", 2)
        ui.label("Alone, on a text of its own, in a brain that stays as it is.").classes("soft")
        with ui.element("div").classes("two"):
            expert_id = ui.input("Id of the expert", value=expert).props("maxlength=64")
            brain = ui.select(brains, label="Brain", value=brains[0])
            text = ui.input("Text of the domain, a path in this workspace", placeholder="training_data/...")
            text.props("maxlength=1000")
            goal = ui.input("Goal (may be empty)").props("maxlength=1000")
            numbers = {name: ui.number(name.replace("_", " "), value=default[name], min=0) for name in _BASIC}
        wrong = ui.label().classes("wrong")
        command = ui.label().classes("command")

        def filled() -> tuple[Any, ...]:
            values = {name: field.value for name, field in numbers.items()}
            return site, expert_id.value.strip(), brain.value, text.value, goal.value.strip(), values

        def preview() -> None:
            outcome = try_call(expert_words, *filled())
            command.set_text(shlex.join(["aios", *outcome.value]) if outcome.value else "")
            command.set_visibility(bool(outcome.value))

        async def start() -> None:
            outcome = await in_thread(expert_words, *filled())
            wrong.set_text(outcome.error)
            if outcome.value is None:
                return
            name = expert_id.value.strip()
            metrics = f"artifacts/experts/{name}/{METRICS}"
            wrong.set_text(await begin(page, f"Train {name}", outcome.value, kind="expert", metrics=metrics))

        for field in (expert_id, brain, text, goal, *numbers.values()):
            field.on_value_change(preview)
        preview()
        with ui.element("div").classes("line"):
            ui.button("Train", on_click=start)
