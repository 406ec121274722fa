"""The process that runs brains: what it answers, stopping it, ending, dying, and files that change under it."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
import weakref
from threading import Event, Timer

import pytest
from safetensors.torch import load_file, save_file

from aios.manager import worker_process
from aios.manager.worker import Worker
from aios.settings.goals import GoalFlags
from aios.settings.sampling import Sampling
from aios.store.goals import Goals
from chronomoe.errors import ChronoMoEError

NAME = "mixtral/straight"
SAMPLING = Sampling(max_new_tokens=16, temperature=0.0, top_p=1.0, top_k=0)


@pytest.fixture
def asked(brain, monkeypatch):
    """The process for a copy of the workspace; it adds in the order in which the tests add."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = Worker(brain.parents[3])
    yield one
    one.end()


def chat(asked, **options):
    own = {name: options.pop(name) for name in list(options) if hasattr(SAMPLING, name)}
    sampling = dataclasses.replace(SAMPLING, **own)
    return asked.ask("chat", NAME, **({"text": "The people\n", "flags": GoalFlags(), "sampling": sampling} | options))


def test_it_says_what_the_commands_say(aios, asked):
    root = asked.root
    pieces = []
    answer = chat(asked, piece=pieces.append)
    printed = aios("generate", "straight", "--root", root, "--prompt", "The people\n", "--temperature", 0,
                   "--max-new-tokens", 16)  # fmt: skip
    assert answer["text"] == printed.out == "The people\n" + "".join(pieces) + "\n"
    assert answer["tokens"] == 16
    assert not answer["stopped"]
    Goals(root).add("Sound like Python", expert="mixtral/straight:0.2")
    flags = GoalFlags(goal=("1",), goal_kl=0.001)
    found = asked.ask("inspect", NAME, text="def f(x):", flags=flags)
    told = aios("goals", "explain", "--brain", "straight", "--text", "def f(x):", "--goal", 1, "--goal-kl", 0.001,
                "--root", root, "--json")  # fmt: skip
    expected = json.loads(told.out)
    assert found["off"]["share"] == expected["off"]["share"]
    assert found["on"]["share"] == expected["on"]["share"]
    assert found["text_kl"] == expected["text_kl"] > 0
    assert len(found["pieces"]) == len(found["on"]["chosen"][0]) == found["tokens"]
    assert "".join(found["pieces"]) == "def f(x):"
    assert {"licences", "oratory"} <= set(found["domains"])
    assert asked.ask("text", NAME, domain="licences", longest=50).strip()
    # Another strength is measured on the text alone, and gives the same for the brain's own experts.
    for strength in (1.0, 4.0):
        again = asked.ask(
            "explain", NAME, text="def f(x):", flags=GoalFlags(goal=("1",), goal_kl=0.001, goal_strength=strength)
        )
        assert (again["text_kl"], again["kl"]) == (expected["text_kl"], expected["kl"])
    # A goal is on where it is asked for, and nowhere else.
    assert chat(asked)["text"] == answer["text"]


def test_an_answer_is_stopped_and_the_next_is_whole(asked):
    whole, stop, pieces = chat(asked), Event(), []

    def heard(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()

    cut = chat(asked, piece=heard, stop=stop, max_new_tokens=60)
    assert cut["stopped"]
    assert 3 <= cut["tokens"] < 60
    with pytest.raises(ChronoMoEError, match="stopped before"):
        chat(asked, stop=stop)
    assert chat(asked)["text"] == whole["text"]


def test_one_that_died_is_told_and_another_begins(asked):
    chat(asked)
    first = asked.process
    with pytest.raises(ChronoMoEError, match=r"has ended .*memory.*ask again"):
        chat(asked, piece=lambda _: first.kill())
    assert chat(asked)["tokens"] == 16
    assert asked.process.pid != first.pid


def test_what_fails_in_it_is_the_commands_sentence(asked):
    for brain in ("mixtral/none", "../../etc", "/etc"):
        with pytest.raises(ChronoMoEError, match=r"there is no brain|not a name"):
            asked.ask("explain", brain, text="x", flags=GoalFlags())
    with pytest.raises(ChronoMoEError, match="the text is empty"):
        asked.ask("explain", NAME, text="", flags=GoalFlags())
    with pytest.raises(ChronoMoEError, match="temperature"):
        chat(asked, temperature=-1.0)
    assert chat(asked)["tokens"] == 16


def test_what_else_needs_torch_is_done_there(asked):
    before = chat(asked)["text"]
    with pytest.raises(ChronoMoEError, match="there is no expert 'nobody'"):
        asked.ask("run", "experts attach", {"expert": "nobody", "brain": NAME})
    done = asked.ask("run", "brains export-hf", {"brain": NAME, "out": asked.root / "plain"})
    assert (done.code, done.value["model_type"]) == (0, "mixtral")
    assert (asked.root / "plain/config.json").is_file()
    assert chat(asked)["text"] == before


def test_there_are_never_two_brains(brain, monkeypatch):
    """Not even after an answer that was stopped, whose frames might hold on to one."""
    worker = worker_process.Tasks(brain.parents[3], lambda piece: False)
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=60)
    assert worker.chat(NAME, text="The people\n", flags=GoalFlags(), sampling=sampling)["stopped"]
    held, read = weakref.ref(worker._loaded.model), worker_process.load_brain
    left = []

    def reading(found):
        left.append(held())
        return read(found)

    monkeypatch.setattr(worker_process, "load_brain", reading)
    (brain / "config.json").touch()  # its files have changed: it is loaded again
    worker.text(NAME, domain="licences", longest=5)
    assert left == [None]


def test_data_outside_the_workspace_is_not_read(asked, brain, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "prepared"
    shutil.copytree(asked.root / "training_data/prepared", away)
    run = json.loads((brain / "run.json").read_text())
    (brain / "run.json").write_text(json.dumps(run | {"run": run["run"] | {"data": str(away)}}))
    assert asked.ask("text", NAME, domain="licences", longest=50) == ""
    assert asked.ask("inspect", NAME, text="def f(x):", flags=GoalFlags())["domains"] == {}
    Goals(asked.root).add("Sound like Python", expert="mixtral/straight:0.2")
    with pytest.raises(ChronoMoEError, match="nothing outside the workspace"):
        asked.ask("explain", NAME, text="def f(x):", flags=GoalFlags(goal=("1",)))


def test_an_answer_that_is_cut_short_says_so(asked):
    lines = chat(asked, max_new_tokens=10**6)["lines"]
    assert lines[0].startswith("Answers end after ")
    assert not any("Answers end" in line for line in chat(asked)["lines"])


def test_it_ends_when_idle_and_reads_weights_that_changed(asked, brain):
    asked.idle = 3.0
    before, first = chat(asked)["text"], asked.process
    file = brain / "model.safetensors"
    weights = load_file(file)

    def write(weights):
        save_file(weights, brain / "new", metadata={"format": "pt"})
        (brain / "new").replace(file)

    write({name: -tensor if "norm" in name else tensor for name, tensor in weights.items()})
    assert chat(asked)["text"] != before
    assert asked.process is first
    first.join(30)
    assert first.exitcode == 0
    write(weights)
    assert chat(asked)["text"] == before
    assert asked.process is not first


def test_the_asking_side_imports_no_torch():
    words = "import sys, aios.manager.worker, aios.manager.tokens; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0


def test_it_ends_with_whoever_asked(brain):
    """Killed without a word."""
    script = (
        "import os, sys, time; from pathlib import Path; from aios.manager.worker import Worker\n"
        "if __name__ == '__main__':\n"
        "    one = Worker(Path(sys.argv[1]))\n"
        "    one._connected(); print(one.process.pid, flush=True); time.sleep(1); os.kill(os.getpid(), 9)\n"
    )
    place = brain.parents[3] / "ask.py"
    place.write_text(script)
    done = subprocess.run([sys.executable, place, brain.parents[3]], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    from aios.manager.jobs import birth_of

    deadline = time.monotonic() + 30
    while birth_of(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert birth_of(pid) is None


def test_who_waits_can_be_stopped_and_nobody_begins_another_when_it_ends(asked):
    stop, told = Event(), []
    with asked._lock:
        stop_soon = Timer(0.3, stop.set)
        stop_soon.start()
        with pytest.raises(ChronoMoEError, match="stopped before"):
            chat(asked, stop=stop)
    asked.end()
    with pytest.raises(ChronoMoEError, match="is ending"):
        chat(asked, piece=told.append)
    assert asked.process is None
    assert not told


def test_a_brain_that_halts_tells_its_segments(aios, workspace):
    base, text = workspace / "artifacts/hf_implant/base_model", workspace / "training_data/licences"
    sizes = ("--hidden-size", 32, "--num-heads", 4, "--h-layers", 1, "--l-layers", 1, "--max-seq-len", 16,
             "--batch-size", 2, "--steps", 1, "--model", base, "--halt-max-steps", 3)  # fmt: skip
    words = ("hrm-hf", "train-actv1", "--root", workspace, "--brain-name", "thinker", "--dataset-file", text)
    assert aios(*words, *sizes).code == 0
    one = Worker(workspace)
    try:
        for most in (1, 3):
            sampling = dataclasses.replace(SAMPLING, max_new_tokens=4, halt="max", segments=most)
            told = one.ask("chat", "actv1/thinker", text="x", flags=GoalFlags(), sampling=sampling)["lines"]
            assert f"{most}.00 of 3 segments a token" in told
    finally:
        one.end()
