import json

import pytest

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
    assert outcome.out.splitlines()[-1] == f"Wrote {tmp_path / 'out'}"
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
