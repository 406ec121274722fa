"""The page that starts the training of a brain, its plan shown first; and what stops and resumes one."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicegui import ui

from aios.brains.brain import METRICS
from aios.brains.run_file import RUN_FILE, RunFile
from aios.manager.frame import Page, Site, framed, heading, in_thread, try_call
from aios.manager.jobs import dry_run
from aios.manager.jobs_page import as_number, begin, inside
from aios.settings.actv1 import ACTv1Run
from aios.settings.train import MixtralRun
from aios.store.goals import Goals
from aios.workspace import Workspace, plain_name
from chronomoe.errors import CheckpointError, ChronoMoEError


@dataclass(frozen=True)
class Form:
    """What the command of one family must be given, and by which flags."""

    title: str
    words: tuple[str, ...]
    name: str
    text: str
    hint: str
    numbers: dict[str, float | None]
    """Flags and what the form begins with; None leaves a flag out."""
    sizes: dict[str, dict[str, int]]
    """Flags of the shape, by the name of a size; the first has all of them as the command does."""


_LIKENESS = "goal-likeness"
"""Only with goals: a new brain has no experts yet that one could be linked to."""
_EXPERTS = ("num-experts", "num-experts-per-tok")
_WIDTHS = ("hidden-dim", "num-layers", *_EXPERTS)
_HEIGHTS = ("hidden-size", "num-heads", "h-layers", "l-layers", *_EXPERTS)


def _sizes(flags: tuple[str, ...], **rows: tuple[int, ...]) -> dict[str, dict[str, int]]:
    return {name: dict(zip(flags, row, strict=True)) for name, row in rows.items()}


FORMS = {
    "mixtral": Form(
        "Mixtral style",
        ("train",),
        "name",
        "data",
        "Prepared data (may be empty)",
        {
            "max-steps": 1000,
            "batch-size": MixtralRun.batch_size,
            "seq-len": 128,
            "learning-rate": 4e-3,
            "log-every-n-steps": 20,
            "seed": MixtralRun.seed,
            _LIKENESS: 0.5,
        },
        _sizes(_WIDTHS, tiny=(64, 2, 4, 2), small=(128, 4, 8, 2), medium=(256, 6, 8, 2)),
    ),
    "actv1": Form(
        "HRM ACTv1",
        ("hrm-hf", "train-actv1"),
        "brain-name",
        "dataset-file",
        "Text, a path in this workspace",
        {
            "steps": ACTv1Run.max_steps,
            "batch-size": ACTv1Run.batch_size,
            "max-seq-len": ACTv1Run.seq_len,
            "lr": 1e-3,
            "log-every": None,
            "seed": ACTv1Run.seed,
            _LIKENESS: 0.5,
        },
        _sizes(_HEIGHTS, tiny=(64, 4, 1, 1, 4, 2), small=(128, 4, 2, 2, 8, 2), medium=(256, 8, 2, 2, 8, 2)),
    ),
}


def add_to(site: Site) -> None:
    """Add the page."""

    @ui.page("/training/new")
    def new_run() -> None:
        with framed(site, "New run", "Training") as page:
            heading("Train a brain")
            with ui.element("section").classes("panel"):
                family = ui.toggle({name: form.title for name, form in FORMS.items()}, value="mixtral")
                family.style("align-self: start")
                place = ui.element("div").classes("stack")

                def show() -> None:
                    place.clear()
                    with place:
                        _Form(page, family.value)

                family.on_value_change(show)
                show()


def run_words(site: Site, family: str, name: str, text: str, numbers: dict[str, Any], goals: list[int]) -> list[str]:
    """Words of the command that trains a brain; raises :class:`ConfigError` for a name or path that cannot be."""
    form = FORMS[family]
    words = [*form.words, f"--{form.name}={plain_name(name)}"]
    words += [f"--{form.text}={inside(site, text)}"] if text.strip() or family == "actv1" else []
    given = {flag: value for flag, value in numbers.items() if value is not None and (goals or flag != _LIKENESS)}
    broken = {flag for flag, usual in form.numbers.items() if isinstance(usual, float)}
    words += [f"--{flag}={as_number(flag, value, flag not in broken)}" for flag, value in given.items()]
    return [*words, *(f"--goal={int(goal)}" for goal in goals), *site.here]


def brain_of(metrics: str) -> tuple[str, str] | None:
    """Family and name of the brain whose metrics these are."""
    parts = Path(metrics).parts
    return (parts[2], parts[3]) if len(parts) == 5 and parts[2] in FORMS and parts[4] == METRICS else None


async def resume(page: Page, metrics: str) -> str:
    """Go on with a brain that was stopped; returns the sentence why not."""
    family, name = brain_of(metrics) or ("", "")
    form, file = FORMS[family], stop_file(page.site, metrics)
    if file is not None and file.is_file() and not file.stat().st_size:
        file.unlink()  # what it was stopped by
    words = [*form.words, f"--{form.name}={name}", "--resume", *page.site.here]
    return await begin(page, f"Resume {name}", words, kind="brain", metrics=metrics)


def stop_file(site: Site, metrics: str) -> Path | None:
    """The file at whose appearance a run stops, if it was given one in this workspace."""
    try:
        named = Path(RunFile.of((site.root / metrics).with_name(RUN_FILE)).run.stop_file or "")
    except ChronoMoEError:
        return None
    return named if named.is_absolute() and named.resolve().is_relative_to(site.root.resolve()) else None


def stop(site: Site, metrics: str) -> str:
    """Ask a run to save and stop, as Ctrl-C does, or by its stop file."""
    job, file = site.jobs.of_run(metrics), stop_file(site, metrics)
    if job is not None:
        site.jobs.cancel(job.id)
    elif file is not None:
        file.touch()
    else:
        raise CheckpointError("it has ended already, or was started elsewhere: press Ctrl-C there.")
    return "Asked it to save and stop."


class _Form:
    """The form of one family; whatever is changed in it puts the plan away again."""

    def __init__(self, page: Page, family: str) -> None:
        self.page, self.family, form = page, family, FORMS[family]
        known = try_call(Goals(page.site.root).all).value or []
        with ui.element("div").classes("two"):
            self.name = ui.input("Name of the brain").props("maxlength=64")
            self.text = ui.input(form.hint).props("maxlength=1000")
            size = ui.select(["as the command has it", *form.sizes], label="Size", value="as the command has it")
            goals = {goal.id: f"{goal.id}: {goal.text[:80]}" for goal in known}
            self.goals = ui.select(goals, label="Goals (may be empty)", value=[], multiple=True)
            shape = next(iter(form.sizes.values()))
            self.numbers = {
                flag: ui.number(flag.replace("-", " "), value=value, min=0)
                for flag, value in (form.numbers | dict.fromkeys(shape)).items()
            }

        def resize() -> None:
            for flag in shape:
                self.numbers[flag].set_value(form.sizes.get(size.value, {}).get(flag))

        size.on_value_change(resize)
        self.wrong, self.command = ui.label().classes("wrong"), ui.label().classes("command")
        self.plan = ui.label().classes("log").props('aria-label="Plan" role="region"')
        with ui.element("div").classes("line"):
            self.ask = ui.button("Show the plan", on_click=self._plan)
            self.start = ui.button("Start training", on_click=self._start)
        for field in (self.name, self.text, self.goals, *self.numbers.values()):
            field.on_value_change(self._changed)
        self._changed()

    def _words(self) -> list[str]:
        numbers = {flag: field.value for flag, field in self.numbers.items()}
        return run_words(self.page.site, self.family, self.name.value, self.text.value, numbers, self.goals.value)

    def _changed(self) -> None:
        outcome = try_call(self._words)
        self.command.set_text(shlex.join(["aios", *(outcome.value or ())]))
        self.command.set_visibility(bool(outcome.value))
        self.planned: list[str] | None = None
        for one in (self.plan, self.start):
            one.set_visibility(False)

    async def _plan(self) -> None:
        outcome = try_call(self._words)
        self.wrong.set_text(outcome.error)
        if outcome.value is None:
            return
        self.ask.props("loading")
        plan = await in_thread(dry_run, outcome.value)
        self.ask.props(remove="loading")
        self.wrong.set_text(plan.error)
        if plan.value is not None and outcome.value == try_call(self._words).value:
            self.planned = outcome.value
            self.plan.set_text(plan.value)
            for one in (self.plan, self.start):
                one.set_visibility(True)

    async def _start(self) -> None:
        if self.planned is not None:
            name, root = self.name.value, self.page.site.root
            place = (Workspace(root).brain(name, self.family) / METRICS).relative_to(root).as_posix()
            self.wrong.set_text(await begin(self.page, f"Train {name}", self.planned, kind="brain", metrics=place))
