import gzip
import tracemalloc
from itertools import islice

import pytest

from aios.data.readers import read_documents
from aios.data.sources import Source, Tally
from chronomoe.errors import DataError


def test_folder_is_sorted_and_what_is_not_text_is_named(tmp_path, read):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {"b.txt": b"B", "a.md": b"A", "sub/c.py": b"C", ".hidden": b"H", ".git/x": b"G"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "prepared" / "tokenizer").mkdir(parents=True)
    (tmp_path / "prepared" / "data.json").write_text("{}")
    tally = Tally()
    assert read(tmp_path, tally) == ["A", "B", "C"]
    assert tally.files == 3
    assert [sentence.split(":")[0] for sentence in tally.left_out] == [f"{tmp_path}/image.png is not text"]
    with pytest.raises(DataError, match="is not text"):
        read(tmp_path / "image.png")


def test_a_folder_with_a_picture_and_a_cut_archive(cases, read):
    folder, tally = cases / "folder", Tally()
    with pytest.raises(DataError, match=r"folder/a/b/cut\.txt\.gz is a damaged.*--skip-damaged"):
        read(folder, tally)
    assert tally.left_out == [f"{folder}/picture.txt is not text: it is a PNG picture"]
    tally = Tally()
    texts = read(folder, tally, skip_damaged=True)
    assert "".join(texts) == (folder / "plain.txt").read_text()
    assert [str(folder / name) in sentence for name, sentence in zip(
        ("picture.txt", "a/b/cut.txt.gz"), tally.left_out, strict=True)] == [True, True]  # fmt: skip
    with pytest.raises(DataError, match=r"picture\.txt is not text: it is a PNG picture"):
        read(folder / "picture.txt")


def test_three_scripts(cases, read):
    assert len(read(cases / "scripts.txt")) == 1
    assert "".join(read(cases / "scripts.txt")) == (cases / "scripts.txt").read_text("utf-8")


def test_missing_empty_and_blank(tmp_path, read):
    with pytest.raises(DataError, match="no file or folder"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="standard input can be read but once; save it in a file"):
        read("-")
    for data in (b"", b" \n\n "):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(DataError, match="holds no text"):
            read(tmp_path / "a.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"holds no text \(.*x\.bin is not text: it holds NUL bytes"):
        read(tmp_path / "folder")


def test_unreadable(tmp_path, monkeypatch, read):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("builtins.open", refuse)
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(DataError, match=f"{tmp_path}/a.txt cannot be read: Permission denied"):
            read(source)


def test_lines_that_are_not_ascii_are_left_out(tmp_path, read):
    (tmp_path / "a.txt").write_text("plain\nnaïve\nplain again\n")
    assert read(tmp_path / "a.txt", ascii_only=True) == ["plain\nplain again\n"]
    (tmp_path / "a.txt").write_text("naïve\n")
    with pytest.raises(DataError, match="holds no ASCII text"):
        read(tmp_path / "a.txt", ascii_only=True)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_large_file_is_never_held_whole(tmp_path, name):
    opened = gzip.open if name.endswith("gz") else open
    with opened(tmp_path / name, "wt") as file:
        for number in range(200):
            file.write(f"some words to read, {number * number}\n\n" * 4000)
    tracemalloc.start()
    count = sum(len(text) for text in islice(read_documents(Source(name="x", path=str(tmp_path / name))), 200))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 3_000_000
    assert peak < 2_000_000
