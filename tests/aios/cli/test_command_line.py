"""The command itself: help, typing errors, config files, exit codes, interruptions."""

import os
import resource
import subprocess
import sys

import pytest

import aios.data.prepare as prepare_module
from aios.cli import main, run
from chronomoe.errors import ConfigError

COMMANDS = ("data", "demo", "doctor", "experts", "generate", "goals", "init", "train")


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_help_is_fast():
    """Measured in time of the processor: what else runs on this machine does not count."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    def once() -> float:
        before = used()
        done = python("from aios.cli import main; main(['--help'])")
        assert done.returncode == 0
        assert all(f" {command} " in done.stdout for command in COMMANDS)
        return used() - before

    assert min(once() for _ in range(3)) < 0.6


def test_what_concerns_every_command_is_taken_anywhere_in_the_line(aios, tmp_path):
    root = str(tmp_path)
    for words in (
        ("--root", root, "--json", "experts", "list"),
        ("experts", "--root", root, "list", "--json"),
        ("experts", "list", "--json", f"--root={root}"),
    ):
        outcome = aios(*words)
        assert (outcome.code, outcome.out) == (0, "[]\n")
    assert aios("goals", "add", "--weight", 0.5, "--root", root, "--", "--root").code == 0
    assert '"text": "--root"' in aios("goals", "list", "--root", root).out
    assert aios("experts", "list", "--root").code == 2


def test_help_shows_the_whole_docstring_of_one_command_and_the_first_line_of_each(aios):
    assert "The brain's own files stay as they are." in aios("experts", "attach", "--help").out
    shown = aios("experts", "--help").out
    assert "Attach experts to a brain, each behind its domain gate." in shown
    assert "stay as they are" not in shown
    assert aios("experts").out == shown


def test_help_and_typing_errors_import_nothing_heavy():
    done = python(
        "import sys; from aios.cli import run\n"
        f"for command in {COMMANDS}: assert run([command, '--help']) == 0, command\n"
        "assert run(['data', 'prepare', '--help']) == run(['--version']) == 0\n"
        "assert run(['experts', 'list', '--help']) == run(['experts', 'list', '--root', '/nowhere']) == 0\n"
        "assert run(['trian']) == run(['train', '--hiden-dim', '3']) == run(['train', '--seq-len', '1']) == 2\n"
        "assert not {'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["trian"], '"train"'),
        (["data", "prepar"], '"prepare"'),
        (["train", "--learning-rat", "1"], "--learning-rate"),
        (["train", "--hiden-dim", "8"], "--hidden-dim"),
        (["train", "--lr-schedule", "cosin"], '"cosine"'),
        (["generate", "--temprature", "1"], "--temperature"),
    ],
)
def test_did_you_mean(aios, words, suggestion):
    outcome = aios(*words)
    assert outcome.code == 2
    assert f"Did you mean {suggestion}?" in " ".join((outcome.out + outcome.err).replace("│", " ").split())


@pytest.mark.parametrize("words", [["train", "--max-steps", "abc"], ["train", "extra"], ["train", "--max-steps"]])
def test_wrong_usage_is_2(aios, words):
    assert aios(*words).code == 2


def test_errors_are_one_sentence_and_debug_shows_the_traceback(aios, tmp_path, monkeypatch):
    outcome = aios("train", "--root", tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith("aios: there is no base model")
    assert outcome.err.count("\n") == 1
    with pytest.raises(ConfigError, match="no base model"):
        main(["train", "--root", str(tmp_path), "--debug"])
    monkeypatch.setenv("AIOS_DEBUG", "1")
    with pytest.raises(ConfigError, match="no base model"):
        main(["train", "--root", str(tmp_path)])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 1, "not enough memory"),
        (ZeroDivisionError("division by zero\nmore"), 1, "ZeroDivisionError: division by zero (add --debug"),
    ],
)
def test_whatever_happens_has_a_sentence_and_a_code(aios, monkeypatch, error, code, said):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(prepare_module, "prepare", fail)
    outcome = aios("data", "prepare", "x")
    assert outcome.code == code
    assert outcome.err.startswith(f"aios: {said}")
    assert outcome.err.count("\n") == 1


def test_main_exits_with_the_code():
    with pytest.raises(SystemExit) as stop:
        main(["generate", "a", "b"])
    assert stop.value.code == 2


SPEAK = "import aios.cli as c; c.app.command(lambda: print({!r} * 9999), name='speak'); c.main(['speak'])"


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", SPEAK.format("x\n")], stdout=out, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_output_the_terminal_cannot_show_is_no_error():
    done = python(SPEAK.format("caf\u00e9\n"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("caf?\n")


# -- --config ------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(aios, made, tmp_path):
    """`aios train --config <text> --dry-run`."""

    def call(text: str | bytes, *options: object):
        file = tmp_path / "run.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return aios("train", "--root", made[0], "--dry-run", "--config", file, *options)

    return call


SMALL = "hidden_dim = 32\nnum_layers = 1\nseq_len = 20\nbatch_size = 2\nmax_steps = 7\n"


def test_config_values_count_and_options_win(plan):
    outcome = plan(SMALL)
    assert outcome.code == 0
    assert "7 steps x 40 tokens" in outcome.out
    assert "1 layers x 8 experts, top-2, width 32" in outcome.out
    assert "3 steps x 60 tokens" in plan(SMALL, "--max-steps", 3, "--seq-len=30").out


def test_a_config_key_named_like_a_command_counts(plan, tmp_path):
    outcome = plan(SMALL + f"data = '{tmp_path / 'elsewhere'}'")
    assert outcome.code == 1
    assert "elsewhere is not prepared data" in outcome.err


@pytest.mark.parametrize("text", ["bogus = 1", "[training]\nmax_steps = 3", "max_steps = 'x'", "lr_schedule = 'cosin'"])
def test_config_keys_and_values_are_checked(plan, text):
    outcome = plan(text)
    assert outcome.code == 2
    assert "run.toml" in "".join((outcome.out + outcome.err).replace("│", "").split())


@pytest.mark.parametrize("text", ["max_steps =", b"\xff", "a = 1\na = 2"])
def test_a_config_file_that_is_no_toml(plan, text):
    outcome = plan(text)
    assert outcome.code == 2
    assert "run.toml is not valid TOML" in outcome.err


@pytest.mark.parametrize("words", [["--config", "gone.toml"], ["--config"], ["--config="], ["--config", "."]])
def test_a_config_file_that_is_not_there(aios, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = aios("train", *words)
    assert outcome.code == 2
    assert "there is no config file" in outcome.err


def test_a_config_file_does_not_outlive_its_command(plan, aios, made):
    plan(SMALL)
    assert "width 128" in aios("train", "--root", made[0], "--dry-run", "--num-layers", 1, "--seq-len", 9).out
    assert run(["--version"]) == 0
