import gzip
import json
import sys
import tracemalloc
import zipfile
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios.data import readers
from aios.data.readers import Source, Tally, parse_source, read_documents
from chronomoe.errors import ConfigError, DataError


def read(path, field=None, tally=None):
    return list(read_documents(Source(name="x", path=str(path)), field=field, tally=tally))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("law=texts/a.txt", ("law", "texts/a.txt", None)),
        ("law=texts/a.txt:2.5", ("law", "texts/a.txt", 2.5)),
        ("texts/my notes.jsonl.gz", ("my_notes", "texts/my notes.jsonl.gz", None)),
        ("texts/a.txt:3", ("a", "texts/a.txt", 3.0)),
        (r"C:\data\a.txt", ("a", r"C:\data\a.txt", None)),
        (r"law=C:\data\a.txt:0.5", ("law", r"C:\data\a.txt", 0.5)),
        ("web=hf:org/data:config:train:2", ("web", "hf:org/data:config:train", 2.0)),
        ("hf:org/data", ("data", "hf:org/data", None)),
    ],
)
def test_source_specs(spec, expected):
    source = parse_source(spec)
    assert (source.name, source.path, source.weight) == expected


def test_an_existing_path_is_taken_whole(tmp_path):
    for name in ("a:2", "b=c.txt"):
        (tmp_path / name).write_text("x")
        source = parse_source(str(tmp_path / name))
        assert (source.path, source.weight) == (str(tmp_path / name), None)


@pytest.mark.parametrize("spec", ["", "name=", "two words=a.txt", "x" * 65 + "=a.txt"])
def test_bad_source_specs(spec):
    with pytest.raises(ConfigError):
        parse_source(spec)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=80))
def test_default_names_are_valid(path):
    assert readers._NAME.fullmatch(readers._default_name(path))


def test_text_is_one_document_unless_separated(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\nmore <|endoftext|> inline\n<|endoftext|>\r\ntwo\n<|endoftext|>\n \n")
    assert read(tmp_path / "a.txt") == ["one\n\nmore <|endoftext|> inline\n", "two\n"]


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraph = "word " * 100 + "\n\n"
    text = paragraph * 400
    (tmp_path / "a.txt").write_text(text)
    documents = read(tmp_path / "a.txt")
    assert "".join(documents) == text
    assert all(document.endswith("\n\n") for document in documents)
    assert all(readers.PIECE <= len(document) < 1.1 * readers.PIECE for document in documents[:-1])
    (tmp_path / "b.txt").write_text("x" * 200_000)
    assert max(map(len, read(tmp_path / "b.txt"))) <= 2 * readers.PIECE


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 7))
def test_undecodable_bytes_are_replaced_and_counted(data, size):
    tally = Tally()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    text = "".join(readers._decoded(chunks, tally))
    assert text == data.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert tally.replaced_bytes == len(data) - len(data.decode("utf-8", "ignore").encode())


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab\n", max_size=60), st.integers(1, 5), st.integers(1, 9))
def test_lines_do_not_depend_on_chunks(text, size, longest):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(readers._lines(pieces)) == text.splitlines(keepends=True)
    assert "".join(readers._lines(pieces, longest)) == text


def test_jsonl_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "content": "c"}\n\n"bare"\n{"text": "t\\ud800", "title": "T"}\n')
    assert read(path) == ["c", "bare", "t?"]
    path.write_text('{"id": 1, "title": "T"}\n')
    assert read(path, field="title") == ["T"]
    with pytest.raises(DataError, match=r"line 1 has no obvious text field; choose one of 'id', 'title' with --field"):
        read(path)
    with pytest.raises(DataError, match="line 1 holds no text"):
        read(path, field="id")
    path.write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read(path)


def test_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"two\nlines, quoted"\n2,\n3,plain\n')
    assert read(path) == ["two\nlines, quoted", "plain"]
    path.write_text("id,body\n1,x\n")
    with pytest.raises(DataError, match=r"no obvious text field; choose one of 'id', 'body' with --field"):
        read(path)
    with pytest.raises(DataError, match=r"no field 'text'"):
        read(path, field="text")
    assert read(path, field="body") == ["x"]
    (tmp_path / "a.tsv").write_text("text\tn\na,b\t1\n")
    assert read(tmp_path / "a.tsv") == ["a,b"]


def test_folder_is_sorted_and_skips_what_is_not_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {"b.txt": b"B", "a.md": b"A", "sub/c.py": b"C", ".hidden": b"H", ".git/x": b"G"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "prepared" / "tokenizer").mkdir(parents=True)
    (tmp_path / "prepared" / "data.json").write_text("{}")
    tally = Tally()
    assert read(tmp_path, tally=tally) == ["A", "B", "C"]
    assert (tally.files, tally.binaries_skipped) == (3, 1)
    with pytest.raises(DataError, match="not text"):
        read(tmp_path / "image.png")


def test_archives(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    assert read(tmp_path / "a.jsonl.gz") == ["zipped"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/two.csv", "text\n2\n")
        archive.writestr("a/one.txt", "1")
        archive.writestr("c.txt.gz", gzip.compress(b"3"))
        archive.writestr("__MACOSX/._one.txt", "no")
        archive.writestr("image.png", b"\0\1")
    tally = Tally()
    assert read(tmp_path / "a.zip", tally=tally) == ["1", "2", "3"]
    assert tally.binaries_skipped == 1
    assert not (tmp_path / "a").exists()


def test_damaged_archives(tmp_path):
    whole = gzip.compress(b"text " * 1000)
    for name, data in {"a.gz": whole[:-20], "b.gz": b"not gzip", "c.zip": b"not zip"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="damaged"):
            read(tmp_path / name)


def test_missing_empty_and_blank(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        read(tmp_path / "nowhere.txt")
    for data in (b"", b" \n\n "):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(DataError, match="holds no text"):
            read(tmp_path / "a.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"holds no text \(1 binary files skipped\)"):
        read(tmp_path / "folder")


def test_unreadable(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read(tmp_path / "a.txt")


def test_data_sets_need_the_optional_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path in ("hf:org/data", tmp_path / "a.parquet"):
        with pytest.raises(DataError, match="pip install datasets"):
            read(path)


def test_data_sets_are_streamed_through_the_optional_package(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(**settings):
            assert settings == {"path": "org/data", "name": "en", "split": "test", "streaming": True}
            return iter([{"id": 1, "text": "one"}, {"id": 2, "text": None}, {"id": 3, "text": "three"}])

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert read("hf:org/data:en:test") == ["one", "three"]


def test_a_large_file_is_never_held_whole(tmp_path):
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(200):
            file.write("some words to read\n\n" * 5000)
    assert (tmp_path / "a.txt").stat().st_size == 20_000_000
    tracemalloc.start()
    count = sum(len(text) for text in islice(read_documents(Source(name="x", path=str(tmp_path / "a.txt"))), 200))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 3_000_000
    assert peak < 2_000_000


def test_json_lines_survive_chunk_borders(tmp_path):
    texts = [f"{i} " + "é" * (i * 37 % 5000) for i in range(100)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    assert read(tmp_path / "a.jsonl") == texts


def test_a_home_folder_in_a_named_source_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes").mkdir()
    assert parse_source("mine=~/notes:2").path == str(tmp_path / "notes")
