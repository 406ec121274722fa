"""aios manager, and what the form for training makes of what is typed."""

import sys
from pathlib import Path

import pytest

from chronomoe.errors import ConfigError


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
        *("experts", "train", "laws", "--brain=mixtral/small", f"--dataset-file={root / 'texts'}"),
        *("--steps=10", "--lr=0.01", "--default-goal=-x", f"--root={root}"),
    ]


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
    ],
)
def test_what_the_form_refuses(site, expert, brain, text, steps):
    from aios.manager.jobs_page import expert_words

    (site.root / "way-out").symlink_to(Path("/etc"))
    with pytest.raises(ConfigError):
        expert_words(site, expert, brain, text, "", {"steps": steps})
    with pytest.raises(ConfigError):
        expert_words(site, "laws", "mixtral/small", "way-out/passwd", "", {})
