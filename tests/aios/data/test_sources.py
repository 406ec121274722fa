import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios.data import sources
from aios.data.sources import Tally, files_below, parse_source
from chronomoe.errors import ConfigError, DataError


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
    for name in ("a:2", "b=c.txt", "d[1].txt", "e*.txt"):
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
    assert sources._NAME.fullmatch(sources._default_name(path))


def test_a_home_folder_in_a_named_source_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes").mkdir()
    assert parse_source("mine=~/notes:2").path == str(tmp_path / "notes")


def test_brackets_in_names_mean_nothing(cases, read, tmp_path):
    texts = read(cases / "brackets")
    assert len(texts) == 2
    assert len(set(texts)) == 2
    for name in ("a1.txt", "a[1].txt", "a*.txt", "a?.txt", "{a,b}.txt"):
        (tmp_path / name).write_text(name)
    assert sorted(read(tmp_path)) == sorted(os.listdir(tmp_path))
    assert read(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_links_that_lead_round_in_a_circle_are_named(tmp_path, read):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text("A")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "me.txt").symlink_to(tmp_path / "me.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.txt").symlink_to(tmp_path / "sub/a.txt")
    tally = Tally()
    assert read(tmp_path, tally) == ["A", "A"]
    assert tally.left_out == [
        f"{tmp_path}/gone.txt is a link that leads nowhere",
        f"{tmp_path}/me.txt is a link that leads to itself",
        f"{tmp_path}/sub/up is a link to a folder; name that as a source of its own",
    ]
    for name, why in (("me.txt", "leads to itself"), ("gone.txt", "leads nowhere")):
        with pytest.raises(DataError, match=f"{name} is a link that {why}"):
            read(tmp_path / name)
    (tmp_path / "all").symlink_to(tmp_path / "sub")
    assert read(tmp_path / "all") == ["A"], "a link that is named is followed"


@pytest.mark.timeout(20)
def test_what_may_never_end_is_refused_without_being_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, kind in (
            (tmp_path / "pipe.txt", "a pipe"),
            (tmp_path / "socket", "a socket"),
            ("/dev/zero", "a dev"),
        ):
            with pytest.raises(DataError, match=f"{path} is {kind}.*save its text in a file"):
                read(path)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "a.txt").write_text("A")
    tally = Tally()
    assert read(tmp_path, tally) == ["A"]
    assert [sentence.split(",")[0] for sentence in tally.left_out] == [
        f"{tmp_path}/pipe.txt is a pipe", f"{tmp_path}/socket is a socket", f"{tmp_path}/zero.txt is a device",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def walk(top, onerror):
        for place in (f"{top}/closed", top):
            onerror(PermissionError(13, "Permission denied", place))
            yield top, [], []

    monkeypatch.setattr(os, "walk", walk)
    tally = Tally()
    with pytest.raises(DataError, match=f"{tmp_path} cannot be read: Permission denied"):
        list(files_below(str(tmp_path), tally))
    assert tally.left_out == [f"{tmp_path}/closed cannot be read: Permission denied"]


def test_of_many_files_left_out_some_are_named_and_all_counted():
    tally = Tally()
    for number in range(30):
        tally.leave_out(f"{number} is no text")
    assert (len(tally.left_out), tally.left_out_count) == (sources.NAMED, 30)
