import errno
import random
import subprocess
import sys

import pytest

from aios.data import prepare as module
from aios.data.prepare import make_tokenizer, prepare
from aios.data.sources import Source
from aios.data.tokenizers import Encoder, tokenizer_fingerprint, train_tokenizer
from aios.settings.data import PrepareConfig
from chronomoe.data.store_info import SplitSize
from chronomoe.data.token_store import TokenStore, unigram_bits_per_byte
from chronomoe.errors import ConfigError, DataError

WORDS = [f"word{i}" for i in range(3000)]
SMALL = PrepareConfig(vocab_size=400)


def prose(seed, length=60):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def quiet(_line):
    pass


@pytest.fixture
def sources(tmp_path):
    """Two domains: 60 documents in one file, 40 files in a folder."""
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(prose(i) for i in range(60)))
    (tmp_path / "b").mkdir()
    for i in range(40):
        (tmp_path / "b" / f"{i}.txt").write_text(prose(1000 + i, 100))
    return [Source(name="a", path=str(tmp_path / "a.txt")), Source(name="b", path=str(tmp_path / "b"))]


def decoded(store, encoder, name, split):
    shard = getattr(store.domain(name), split)
    return [encoder.tokenizer.decode(shard.document(i).tolist()) for i in range(len(shard))]


def test_everything_is_there_once_and_heldout_apart(sources, tmp_path):
    lines = []
    report = prepare(sources, tmp_path / "out", SMALL, report=lines.append)
    store = TokenStore.open(tmp_path / "out")
    encoder = Encoder.open(tmp_path / "out" / "tokenizer")
    assert report.info == store.info
    assert report.warnings == ()
    assert any("a:" in line for line in lines)
    trained, held = (decoded(store, encoder, "a", split) for split in ("train", "heldout"))
    assert sorted(text.strip() for text in trained + held) == sorted(prose(i) for i in range(60))
    assert held
    assert not set(trained) & set(held)
    for domain in store.info.domains:
        for split in ("train", "heldout"):
            size = getattr(domain, split)
            texts = decoded(store, encoder, domain.name, split)
            assert size.documents == len(texts)
            assert size.bytes == sum(len(text.encode()) for text in texts)
    assert store.info.tokenizer_fingerprint == tokenizer_fingerprint(tmp_path / "out" / "tokenizer")
    assert set(unigram_bits_per_byte(store)) == {"a", "b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b", "out"], "no temporary left"


def test_fingerprint_is_deterministic_and_sees_text_and_settings(sources, tmp_path):
    def fingerprint(name, config=SMALL):
        return prepare(sources, tmp_path / name, config, report=quiet).info.fingerprint

    first = fingerprint("one")
    assert fingerprint("two") == first
    assert fingerprint("three", PrepareConfig(vocab_size="bytes")) != first
    (tmp_path / "b" / "0.txt").write_text(prose(5000, 100))
    assert fingerprint("four") != first


def test_heldout_text_does_not_shape_the_tokenizer(sources, tmp_path, monkeypatch):
    seen = []

    def spy(texts, vocab_size, folder):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size, folder)

    monkeypatch.setattr(module, "train_tokenizer", spy)
    info = prepare(sources, tmp_path / "out", SMALL, report=quiet).info
    assert len(seen) == sum(domain.train.documents for domain in info.domains) == len(set(seen))
    held = decoded(TokenStore.open(tmp_path / "out"), Encoder.open(tmp_path / "out" / "tokenizer"), "a", "heldout")
    assert held
    assert not set(held) & set(seen)


def test_weights(sources, tmp_path):
    info = prepare(sources, tmp_path / "one", SMALL, report=quiet).info
    a, b = info.domains
    assert a.weight / b.weight == pytest.approx(a.train.tokens / b.train.tokens)
    weighted = [Source(name=s.name, path=s.path, weight=w) for s, w in zip(sources, (1, 3), strict=True)]
    info = prepare(weighted, tmp_path / "two", SMALL, report=quiet).info
    assert [domain.weight for domain in info.domains] == [0.25, 0.75]
    with pytest.raises(ConfigError, match="every source a weight, or none"):
        prepare([weighted[0], sources[1]], tmp_path / "three", SMALL)
    with pytest.raises(ConfigError, match="weight 0"):
        prepare([Source(name="a", path="x", weight=0)], tmp_path / "three", SMALL)


def test_sources_of_one_name_are_one_domain_and_names_may_not_clash(sources, tmp_path):
    same = [Source(name="ab", path=source.path) for source in sources]
    [domain] = prepare(same, tmp_path / "out", SMALL, report=quiet).info.domains
    assert domain.train.documents + domain.heldout.documents == 100
    assert domain.sources == tuple(source.path for source in sources)
    for names in (("A", "a"), ("Tokenizer", "b")):
        with pytest.raises(ConfigError, match="Domain names"):
            prepare([Source(name=n, path=s.path) for n, s in zip(names, sources, strict=True)], tmp_path / "x", SMALL)


def test_a_given_tokenizer_is_used_unchanged(sources, tmp_path):
    prepare(sources, tmp_path / "one", SMALL, report=quiet)
    tokenizer = tmp_path / "one" / "tokenizer"
    (tokenizer / "config.json").write_text("{}")
    config = PrepareConfig(tokenizer=tokenizer)
    report = prepare([sources[1]], tmp_path / "two", config, report=quiet)
    assert report.info.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert not (tmp_path / "two" / "tokenizer" / "config.json").exists()


def test_an_error_about_a_tokenizer_names_the_folder_that_was_given(sources, tmp_path):
    prepare(sources, tmp_path / "one", SMALL, report=quiet)
    mine = tmp_path / "one/tokenizer"
    (mine / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=f"^The tokenizer in {mine} has no eos_token"):
        prepare(sources, tmp_path / "two", PrepareConfig(tokenizer=mine), report=quiet)
    (mine / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=f"^{mine}/tokenizer.json is damaged"):
        prepare(sources, tmp_path / "two", PrepareConfig(tokenizer=mine), report=quiet)
    with pytest.raises(DataError, match=f"^{tmp_path}/b holds no tokenizer.json"):
        prepare(sources, tmp_path / "two", PrepareConfig(tokenizer=tmp_path / "b"), report=quiet)


def test_a_tokenizer_that_is_made_alone_is_the_one_that_preparing_makes(sources, tmp_path):
    prepare(sources, tmp_path / "data", SMALL, report=quiet)
    encoder = make_tokenizer(sources, tmp_path / "mine", SMALL, report=quiet)
    assert encoder.vocab_size == 400
    assert tokenizer_fingerprint(tmp_path / "mine") == tokenizer_fingerprint(tmp_path / "data/tokenizer")
    with pytest.raises(ConfigError, match="already holds a tokenizer; add --overwrite"):
        make_tokenizer(sources, tmp_path / "mine", SMALL, report=quiet)
    make_tokenizer(sources, tmp_path / "mine", SMALL.replace(vocab_size="bytes", overwrite=True), report=quiet)
    assert Encoder.open(tmp_path / "mine").vocab_size == 257
    for place in ("b", "a.txt"):
        with pytest.raises(ConfigError, match="is not a tokenizer; choose another place"):
            make_tokenizer(sources, tmp_path / place, SMALL, report=quiet)
    (tmp_path / "mine/notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"also holds notes\.md; choose another place"):
        make_tokenizer(sources, tmp_path / "mine", SMALL.replace(overwrite=True), report=quiet)


def test_characters_are_counted(cases, tmp_path):
    source = Source(name="scripts", path=str(cases / "scripts.txt"))
    lines = []
    [domain] = prepare([source], tmp_path / "out", SMALL, report=lines.append).info.domains
    assert domain.train.characters + domain.heldout.characters < domain.train.bytes + domain.heldout.bytes
    store, encoder = TokenStore.open(tmp_path / "out"), Encoder.open(tmp_path / "out/tokenizer")
    texts = decoded(store, encoder, "scripts", "train")
    assert domain.train.characters == sum(map(len, texts))
    share, unit = domain.train.tokens_per()
    assert (share, unit) == ((domain.train.tokens - len(texts)) / domain.train.characters, "character")
    assert f"{share:.2f} per character" in lines[-1]
    assert SplitSize(tokens=11, documents=1, bytes=20).tokens_per() == (0.5, "byte"), "data of an earlier version"


def test_damaged_files_of_a_folder(cases, tmp_path):
    source, lines = Source(name="mine", path=str(cases / "folder")), []
    with pytest.raises(DataError, match=r"a/b/cut\.txt\.gz is a damaged"):
        prepare([source], tmp_path / "out", SMALL, report=lines.append)
    assert "folder/picture.txt is not text" in lines[-1]
    report = prepare([source], tmp_path / "out", SMALL.replace(skip_damaged=True), report=quiet)
    for name in ("picture.txt is not text", "a/b/cut.txt.gz is a damaged"):
        assert any(f"mine: left out, {cases}/folder/{name}" in warning for warning in report.warnings)
    sizes = [getattr(report.info.domains[0], split) for split in ("train", "heldout")]
    size = (cases / "folder/plain.txt").stat().st_size
    assert sum(one.bytes for one in sizes) in (size, size - 1), "the rest is used, in both passes"


def test_near_duplicates_of_any_domain_are_dropped_and_counted(sources, tmp_path):
    plain = prepare(sources, tmp_path / "one", SMALL, report=quiet).info.domains[0]
    store, encoder = TokenStore.open(tmp_path / "one"), Encoder.open(tmp_path / "one" / "tokenizer")
    victim = decoded(store, encoder, "a", "heldout")[0]
    # The copy stands in another domain, far from the front, with some words changed and its own hash.
    for number in range(40):
        (tmp_path / "b" / f"copy{number}.txt").write_text(f"{victim.strip().upper()} and {prose(number, 20)}")
    info = prepare(sources, tmp_path / "two", SMALL, report=quiet).info.domains[0]
    assert info.near_duplicates_dropped == 1
    assert info.heldout.documents == plain.heldout.documents - 1
    assert info.train.bytes == plain.train.bytes


def test_warnings(tmp_path):
    # One document, so its end is held out, but training holds all of it again and again.
    (tmp_path / "same.txt").write_text("the same words come over and over again\n" * 50)
    (tmp_path / "bad").mkdir()
    for i in range(30):
        (tmp_path / "bad" / f"{i}.txt").write_bytes(prose(i).encode() + b"\xff\xfe\n")
    (tmp_path / "bad" / "x.bin").write_bytes(b"\0")
    (tmp_path / "one.txt").write_text("word")
    sources = [Source(name=name, path=str(tmp_path / name)) for name in ("same.txt", "bad", "one.txt")]
    report = prepare([Source(name=s.name[:4].strip("."), path=s.path) for s in sources], tmp_path / "out", SMALL)
    assert report.warnings == (
        "same: no held-out text, so it cannot be evaluated: training text nearly repeats all of it.",
        "bad: 60 bytes were not UTF-8 and were replaced.",
        f"bad: left out, {tmp_path}/bad/x.bin is not text: it holds NUL bytes; if it is UTF-16, save it as UTF-8.",
        "one: no held-out text, so it cannot be evaluated: it is too short.",
    )
    assert report.info.domains[1].replaced_bytes == 60


def test_nothing_appears_when_a_source_is_bad(sources, tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        prepare([*sources, Source(name="c", path=str(tmp_path / "gone"))], tmp_path / "out", SMALL, report=quiet)
    with pytest.raises(ConfigError, match="at least one source"):
        prepare([], tmp_path / "out")
    with pytest.raises(ConfigError, match="heldout_fraction"):
        prepare(sources, tmp_path / "out", PrepareConfig(heldout_fraction=0.6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DataError, "disk is full"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_broken_off_run_leaves_nothing(sources, tmp_path, monkeypatch, error, raised, message):
    prepare(sources, tmp_path / "old", SMALL, report=quiet)
    before = TokenStore.open(tmp_path / "old").info.fingerprint

    def fail(*args):
        raise error

    monkeypatch.setattr(module.TokenShardWriter, "append", fail)
    for out, config in (("out", SMALL), ("old", PrepareConfig(vocab_size="bytes", overwrite=True))):
        with pytest.raises(raised, match=message):
            prepare(sources, tmp_path / out, config, report=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b", "old"]
    assert TokenStore.open(tmp_path / "old").info.fingerprint == before


def test_overwriting(sources, tmp_path):
    out = tmp_path / "out"
    prepare(sources, out, SMALL, report=quiet)
    with pytest.raises(ConfigError, match="add --overwrite"):
        prepare(sources, out, SMALL, report=quiet)
    again = PrepareConfig(vocab_size="bytes", overwrite=True)
    assert prepare(sources, out, again, report=quiet).info.vocab_size == 257
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"also holds notes\.txt"):
        prepare(sources, out, again, report=quiet)
    with pytest.raises(ConfigError, match="not prepared data"):
        prepare(sources, tmp_path / "b", again, report=quiet)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "b").iterdir())) == 40


def test_a_directory_that_came_up_meanwhile_is_not_replaced(tmp_path):
    def make() -> None:
        with module._prepared_directory(tmp_path / "out", overwrite=True) as stage:
            (stage / "x").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "y").write_text("other")

    with pytest.raises(ConfigError, match="not prepared data"):
        make()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "y"]


def test_batches_stream():
    taken = []

    def texts():
        for i in range(1000):
            taken.append(i)
            yield "x" * 100_000

    first = next(module._batches(texts()))
    assert len(first) == len(taken) == 10


def test_import_is_cheap():
    code = "import sys, aios.data.corpora; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
