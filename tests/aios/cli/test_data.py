import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from aios.cli import run
from aios.data.tokenizers import tokenizer_fingerprint

TEXT = "".join(f"line {i}: some words that go on and on, {i * i} of them.\n\n" for i in range(4000))


@pytest.fixture
def prepare(aios, tmp_path):
    def call(source, *options):
        return aios("data", "prepare", source, "--out", tmp_path / "out", "--vocab-size", "bytes", *options)

    return call


def test_undecodable_bytes_are_replaced_counted_and_reported(prepare, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n\n" * 3 + TEXT.encode())
    outcome = prepare(tmp_path / "a.txt")
    assert outcome.code == 0
    assert "a: 3 bytes were not UTF-8 and were replaced." in outcome.out
    assert f"Wrote {tmp_path / 'out'}" in outcome.out.splitlines()
    [domain] = json.loads((tmp_path / "out/data.json").read_text())["domains"]
    assert domain["heldout"]["documents"] > 0


def test_named_and_weighted_sources(aios, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name + TEXT)
    sources = (f"first={tmp_path / 'a.txt'}:1", f"second={tmp_path / 'b.txt'}:3")
    outcome = aios("data", "prepare", *sources, "--out", tmp_path / "out", "--vocab-size", 300)
    assert outcome.code == 0
    domains = json.loads((tmp_path / "out/data.json").read_text())["domains"]
    assert [(domain["name"], domain["weight"]) for domain in domains] == [("first", 0.25), ("second", 0.75)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "no file or folder"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n\t\n", "holds no text"),
        ("separators.txt", b"<|endoftext|>\n<|endoftext|>\n", "holds no text"),
        ("binary.txt", b"\0\1", "is not text"),
        ("table.csv", b"a,b\n1,x\n", "choose one of 'a', 'b' with --field"),
        ("broken.jsonl", b'{"text": "x"}\n{\n', "line 2 is not JSON"),
        ("broken.gz", b"x", "damaged or unsupported archive"),
        ("broken.zip", b"x", "damaged or unsupported archive"),
    ],
)
def test_text_that_cannot_be_used(prepare, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = prepare(tmp_path / name)
    assert outcome.code == 1
    assert said in outcome.err
    assert str(tmp_path / name) in outcome.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_named_field(prepare, tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,hello\n")
    outcome = prepare(tmp_path / "t.csv", "--field", "c")
    assert (outcome.code, "no field 'c'" in outcome.err) == (1, True)
    assert prepare(tmp_path / "t.csv", "--field", "b").code == 0


def test_a_second_run_into_the_same_folder(prepare, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert prepare(tmp_path / "a.txt").code == 0
    before = (tmp_path / "out/data.json").read_text()
    (tmp_path / "a.txt").write_text(TEXT * 2)
    outcome = prepare(tmp_path / "a.txt")
    assert (outcome.code, "--overwrite" in outcome.err) == (2, True)
    assert (tmp_path / "out/data.json").read_text() == before
    assert prepare(tmp_path / "a.txt", "--overwrite").code == 0
    assert (tmp_path / "out/data.json").read_text() != before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "at least one file or folder"),
        (["../x=a"], "The name '../x'"),
        (["a.txt:0"], "weight 0"),
        (["a.txt", "--heldout-fraction", "2"], "heldout_fraction"),
        (["a.txt", "--vocab-size", "3"], "vocab_size"),
        (["a.txt", "--out", "occupied"], "is not prepared data"),
    ],
)
def test_wrong_usage(aios, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/mine.txt").write_text("mine")
    outcome = aios("data", "prepare", *words)
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert (tmp_path / "occupied/mine.txt").read_text() == "mine"
    assert not (tmp_path / "training_data/prepared").exists()


def test_a_tokenizer_folder_that_is_none(prepare, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    outcome = prepare(tmp_path / "a.txt", "--tokenizer", tmp_path)
    assert (outcome.code, "holds no tokenizer.json" in outcome.err) == (1, True)


def test_interrupted(prepare, tmp_path, monkeypatch):
    from chronomoe.data.token_store import TokenShardWriter

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenShardWriter, "append", interrupt)
    (tmp_path / "a.txt").write_text(TEXT)
    assert prepare(tmp_path / "a.txt").code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_next_command_is_printed_and_works(prepare, aios, tmp_path, workspace):
    (tmp_path / "a.txt").write_text(TEXT)
    outcome = prepare(tmp_path / "a.txt", "--root", workspace, "--json")
    [command] = json.loads(outcome.out)["next"]
    assert "--tokenizer" in command, "it has another tokenizer than the base model"
    assert aios(*shlex.split(command)[1:], "--dry-run", "--seq-len", 8, "--num-layers", 1).code == 0
    outcome = prepare(tmp_path / "a.txt", "--root", tmp_path / "empty", "--overwrite")
    assert "Next: aios init --tokenizer" in outcome.out


@pytest.fixture(scope="module")
def river(tmp_path_factory):
    """A workspace made from a tokenizer and text of one's own, by what the messages said, and what they were."""
    cases, root = Path(__file__).parents[2] / "fixtures/cases", tmp_path_factory.mktemp("own") / "w"
    printed = io.StringIO()

    def call(command, *more):
        with contextlib.redirect_stdout(printed):
            assert run([*shlex.split(command)[1:], *map(str, more)]) == 0, command
        return [line.removeprefix("Next: ") for line in printed.getvalue().splitlines() if line.startswith("Next: ")]

    text = shlex.quote(f"river={cases / 'scripts.txt'}")
    init, ready = call(f"aios data tokenizer {text} --out {root}/tok --vocab-size 400 --root {root}")[-2:]
    (root / "tok/chat_template.jinja").write_text("{{ messages[0].content }}")
    call(init, "--max-bytes", 20_000)
    train = call(ready, "--root", root)[-1]
    shape = ("--hidden-dim", 32, "--num-layers", 1, "--num-experts", 4, "--seq-len", 16, "--batch-size", 2)
    call(train, *shape, "--dry-run")
    generate = call(train, *shape, "--max-steps", 3, "--eval-tokens", 100)[-1]
    call(generate, "--max-new-tokens", 4)
    return root, printed.getvalue(), generate


def test_messages_lead_from_a_tokenizer_of_ones_own_to_a_generated_text(river):
    root, printed, _ = river
    fingerprints = {tokenizer_fingerprint(folder) for folder in (
        root / "tok", root / "artifacts/hf_implant/base_model", root / "training_data/river/tokenizer",
        root / "artifacts/brains/mixtral/river")}  # fmt: skip
    assert len(fingerprints) == 1
    assert (root / "artifacts/brains/mixtral/river/chat_template.jinja").is_file(), "all of a tokenizer goes along"
    assert re.search(r"^text         river 0\.\d\d tokens per character$", printed, re.MULTILINE)


def test_three_scripts_are_streamed_as_they_are_generated_whole(river, aios):
    *_, generate = river
    for seed in range(4):
        options = ("--max-new-tokens", 60, "--seed", seed, "--prompt", "川は नदी Река")
        streamed, whole = (aios(*shlex.split(generate)[1:], *options, flag).out for flag in ("--stream", "--no-stream"))
        assert streamed == whole
        assert streamed.startswith("川は नदी Река")


def test_another_tokenizer_says_how_to_go_on(river, aios, tmp_path):
    root, *_ = river
    text = Path(__file__).parents[2] / "fixtures/cases/scripts.txt"
    assert aios("data", "prepare", text, "--vocab-size", 300, "--out", tmp_path / "data").code == 0
    train = ("train", "--root", root, "--name", "x", "--dry-run", "--seq-len", 8, "--num-layers", 1)
    outcome = aios(*train, "--data", tmp_path / "data")
    assert outcome.code == 2
    own = ("--tokenizer", tmp_path / "data/tokenizer")
    assert shlex.join(map(str, own)) in outcome.err
    assert aios(*train, "--data", tmp_path / "data", *own).code == 0
    assert aios(*shlex.split(outcome.err.split("`")[1])[1:]).code == 0
    assert aios(*train, "--data", tmp_path / "data").code == 0
    outcome = aios(*train, "--data", tmp_path / "data", "--tokenizer", tmp_path)
    assert (outcome.code, f"{tmp_path} holds no tokenizer.json" in outcome.err) == (1, True)
    weights = root / "artifacts/brains/mixtral/river"
    assert aios("data", "prepare", text, "--vocab-size", 300, "--out", tmp_path / "other").code == 0
    outcome = aios(
        *train[:5], "--dry-run", "--model", weights, "--data", tmp_path / "other", "--tokenizer", tmp_path / "other"
    )
    assert (outcome.code, "trained with its own tokenizer" in outcome.err) == (2, True)


def test_a_workspace_with_another_tokenizer_says_how_to_go_on(river, made, aios):
    root, _ = made
    before = (root / "artifacts/hf_implant/base_model/tokenizer.json").read_bytes()
    outcome = aios("init", "--root", root, "--tokenizer", river[0] / "tok", "--max-bytes", 60000)
    assert (outcome.code, "--overwrite" in outcome.err, "aios train --tokenizer" in outcome.err) == (2, True, True)
    assert (root / "artifacts/hf_implant/base_model/tokenizer.json").read_bytes() == before
    outcome = aios("init", "--root", river[0], "--tokenizer", river[0] / "tok", "--max-bytes", 20_000)
    assert outcome.code == 0, "the same one again"


def test_an_hrm_brain_with_a_tokenizer_of_its_own(river, aios, made):
    root, *_ = river
    text = Path(__file__).parents[2] / "fixtures/cases/scripts.txt"
    train = (
        "hrm-hf",
        "train-actv1",
        "--dataset-file",
        text,
        "--tokenizer",
        root / "tok",
        "--dry-run",
        "--root",
        made[0],
    )
    outcome = aios(*train, "--hidden-size", 32, "--num-heads", 2, "--h-layers", 1, "--l-layers", 1, "--max-seq-len", 8)
    assert outcome.code == 0, outcome.err
    assert "text         text 0." in outcome.out
