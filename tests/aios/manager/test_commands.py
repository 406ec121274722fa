"""aios manager, and what the form for training makes of what is typed."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from aios.actions import goals
from chronomoe.errors import CheckpointError, ConfigError


def test_without_nicegui_it_says_what_to_install(aios, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    for name in ("manager", "gui"):
        outcome = aios(name, "--root", tmp_path)
        assert outcome.code == 2
        assert outcome.err == "aios: the manager needs nicegui: pip install 'chronomoe-aios[manager]'.\n"


def test_another_host_needs_a_token_and_a_port_that_is_free(aios, tmp_path):
    pytest.importorskip("nicegui")
    outcome = aios("manager", "--root", tmp_path, "--host", "0.0.0.0", "--no-open")
    assert (outcome.code, "--token" in outcome.err) == (2, True)
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = aios("manager", "--root", tmp_path, "--port", taken.getsockname()[1], "--no-open")
    assert (outcome.code, "--port" in outcome.err) == (2, True)
    assert aios("manager", "--root", tmp_path / "none", "--no-open").code == 2


@pytest.fixture
def site(tmp_path):
    pytest.importorskip("nicegui")
    from aios.manager.frame import Site

    run = tmp_path / "artifacts/brains/mixtral/small/run.json"
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    (tmp_path / "texts").mkdir()
    return Site(tmp_path)


def test_the_words_that_train_an_expert(site):
    from aios.manager.jobs_page import expert_words

    root = site.root
    assert expert_words(site, "laws", "mixtral/small", "texts", "-x", {"steps": 10.0, "lr": 0.01, "seed": None}) == [
        *("experts", "train", "laws", "--dataset-file", str(root / "texts"), "--brain", "mixtral/small"),
        *("--steps", "10", "--lr", "0.01", "--default-goal=-x", f"--root={root}"),
    ]


@pytest.mark.parametrize("text", ["Write verse", "--weight", "-x", "--", "-- --", "it's"])
def test_the_command_that_adds_a_goal_adds_that_text(aios, site, text):
    from aios.store.goals import Goals

    command = site.command_line(goals.add, text=text, weight=0.5)
    assert aios(*shlex.split(command)[1:]).code == 0
    assert [(goal.text, goal.weight) for goal in Goals(site.root).all()] == [(text, 0.5)]


@pytest.mark.parametrize(
    ("expert", "brain", "text", "steps"),
    [
        ("../laws", "mixtral/small", "texts", 1),
        ("--force", "mixtral/small", "texts", 1),
        ("laws", "../../etc", "texts", 1),
        ("laws", "mixtral/small", "../..", 1),
        ("laws", "mixtral/small", "/etc/passwd", 1),
        ("laws", "mixtral/small", "", 1),
        ("laws", "mixtral/small", "nothing-here", 1),
        ("laws", "mixtral/small", "texts\0", 1),
        ("laws", "mixtral/small", "texts", 0),
        ("laws", "mixtral/small", "texts", 1.5),
        ("laws", "mixtral/small", "texts", float("inf")),
    ],
)
def test_what_the_form_refuses(site, expert, brain, text, steps):
    from aios.manager.jobs_page import expert_words

    (site.root / "way-out").symlink_to(Path("/etc"))
    with pytest.raises(ConfigError):
        expert_words(site, expert, brain, text, "", {"steps": steps})
    with pytest.raises(ConfigError):
        expert_words(site, "laws", "mixtral/small", "way-out/passwd", "", {})


def test_the_words_that_train_a_brain(site):
    from aios.manager.run_form import run_words

    root = site.root
    numbers = {"max-steps": 10.0, "learning-rate": 4e-3, "seed": None, "goal-likeness": 0.5}
    assert run_words(site, "mixtral", "x", " ", numbers, [3]) == [
        *(
            "train",
            "--name=x",
            "--max-steps=10",
            "--learning-rate=0.004",
            "--goal-likeness=0.5",
            "--goal=3",
            f"--root={root}",
        )
    ]
    assert run_words(site, "actv1", "x", "texts", {"goal-likeness": 0.5}, []) == [
        *("hrm-hf", "train-actv1", "--brain-name=x", f"--dataset-file={root / 'texts'}", f"--root={root}")
    ]
    for family, name, text in (
        ("mixtral", "../x", ""),
        ("mixtral", "x", "/etc"),
        ("actv1", "x", ""),
        ("actv1", "", "texts"),
    ):
        with pytest.raises(ConfigError):
            run_words(site, family, name, text, {}, [])
    with pytest.raises(ConfigError, match=r"max steps is 1\.5; it must be a whole number"):
        run_words(site, "mixtral", "x", "", {"max-steps": 1.5}, [])
    with pytest.raises(ValueError, match="could not convert"):
        run_words(site, "mixtral", "x", "", {"seed": "1 --yes"}, [])


def test_every_flag_of_the_forms_is_one_of_the_command(aios):
    pytest.importorskip("nicegui")
    from aios.manager.run_form import FORMS

    for form in FORMS.values():
        told = aios(*form.words, "--help").out
        for flag in (
            form.name,
            form.text,
            "goal",
            *form.numbers,
            *(flag for size in form.sizes.values() for flag in size),
        ):
            assert f"--{flag} " in told, flag


def test_the_stop_file_of_a_run(site, tmp_path):
    from aios.brains.run_file import RunFile
    from aios.manager.run_form import brain_of, stop, stop_file
    from aios.settings.train import MixtralRun
    from chronomoe.storage import write_json

    metrics = "artifacts/brains/mixtral/small/metrics.jsonl"
    assert brain_of(metrics) == ("mixtral", "small")
    assert brain_of("artifacts/experts/laws/metrics.jsonl") is None
    for named, found in (
        (str(tmp_path / "STOP"), tmp_path / "STOP"), ("STOP", None), ("/etc/stop", None), (None, None),
        (str(tmp_path / "../STOP"), None),
    ):  # fmt: skip
        file = RunFile(family="mixtral", run=MixtralRun(stop_file=named)).to_json()
        file["run"]["stop_file"] = named  # edited by hand
        write_json(tmp_path / "artifacts/brains/mixtral/small/run.json", {"format": "aios-run", "version": 2, **file})
        assert stop_file(site, metrics) == found
    with pytest.raises(CheckpointError, match="Ctrl-C there"):
        stop(site, metrics)


def test_the_page_loads_no_torch():
    pytest.importorskip("nicegui")
    heavy = {"torch", "transformers", "numpy"}
    code = f"import sys, aios.manager.application, aios.brains.brain; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_web_libraries_are_imported_fast():
    """Without what only python-socketio's client needs; afterwards everything is as before."""
    pytest.importorskip("nicegui")
    code = (
        "import gc, sys; from aios.manager.command import _fast_imports\n"
        "with _fast_imports():\n    import aios.manager.application\n"
        "assert gc.isenabled() and 'aiohttp' not in sys.modules and 'socketio' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
