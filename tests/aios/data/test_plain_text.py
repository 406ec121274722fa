import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios.data import plain_text
from aios.data.plain_text import HEAD, decoded, lines, why_no_text
from aios.data.sources import Tally
from chronomoe.errors import DataError


def test_text_is_one_document_unless_separated(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\nmore <|endoftext|> inline\n<|endoftext|>\r\ntwo\n<|endoftext|>\n \n")
    assert read(tmp_path / "a.txt") == ["one\n\nmore <|endoftext|> inline\n", "two\n"]


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, read):
    paragraph = "word " * 100 + "\n\n"
    text = paragraph * 400
    (tmp_path / "a.txt").write_text(text)
    documents = read(tmp_path / "a.txt")
    assert "".join(documents) == text
    assert all(document.endswith("\n\n") for document in documents)
    assert all(plain_text.PIECE <= len(document) < 1.1 * plain_text.PIECE for document in documents[:-1])
    (tmp_path / "b.txt").write_text("x" * 200_000)
    assert max(map(len, read(tmp_path / "b.txt"))) <= 2 * plain_text.PIECE


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 7))
def test_undecodable_bytes_are_replaced_and_counted(data, size):
    tally = Tally()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    text = "".join(decoded(chunks, tally))
    assert text == data.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert tally.replaced_bytes == len(data) - len(data.decode("utf-8", "ignore").encode())


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab\n", max_size=60), st.integers(1, 5), st.integers(1, 9))
def test_lines_do_not_depend_on_chunks(text, size, longest):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(lines(pieces, where="a", most=99)) == text.splitlines(keepends=True)
    assert "".join(lines(pieces, where="a", most=99, longest=longest)) == text


@pytest.mark.parametrize("longest", [None, 10])
def test_a_line_without_end_is_refused_at_its_limit(longest):
    taken = 0

    def endless():
        nonlocal taken
        yield "first\n"
        while True:
            taken += 1
            yield "x" * 100

    with pytest.raises(DataError, match=r"a\.txt, line 2 is longer than 1,000 characters; divide it"):
        for _ in lines(endless(), where="a.txt", most=1000, longest=longest):
            pass
    assert taken == 11


def test_a_text_of_one_long_line_is_usable(tmp_path, read, monkeypatch):
    (tmp_path / "a.txt").write_text("one line of words " * 20_000)
    assert "".join(read(tmp_path / "a.txt")) == "one line of words " * 20_000
    monkeypatch.setattr("aios.data.readers.LONGEST_LINE", 300_000)
    with pytest.raises(DataError, match=r"a\.txt, line 1 is longer than 300,000 characters"):
        read(tmp_path / "a.txt")


SCRIPTS = [
    "Заметка: река поднялась на сантиметр, мост выдержал. ", "川は1センチ上がった。橋は持ちこたえた。",
    "नदी एक सेंटीमीटर बढ़ी। ",
    "نهر ارتفع سنتيمترا واحدا. ", "แม่น้ำสูงขึ้นหนึ่งเซนติเมตร ", 
    "강이 1센티미터 올랐다. ", "🌊🌉⛵ ", "ἡ γέφυρα ἄντεξεν. ", "\x1b[31mred\x1b[0m ",
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_text_of_any_script_is_text_wherever_it_is_cut(script):
    data = (script * 2000).encode()
    assert all(why_no_text(data[: HEAD - cut]) is None for cut in range(4))


@pytest.mark.parametrize(
    "text", ["Der Fluß stieg, die Brücke hielt. ", "déjà été élevé à l'Élysée, où çà ", "ÆØÅ æøå þórður "]
)
def test_mostly_ascii_text_of_another_encoding_stays_usable(text):
    assert why_no_text((text * 200).encode("latin-1")) is None


def test_what_is_no_text_is_recognized_without_a_nul():
    noise = bytes(random.Random(0).choices(range(1, 256), k=HEAD))
    assert "is not UTF-8" in why_no_text(noise)
    assert "convert it" in why_no_text(("Река поднялась, мост выдержал. " * 20).encode("cp1251"))
    assert "PNG" in why_no_text(b"\x89PNG\r\n\x1a\n" + noise)
    assert "PDF" in why_no_text(b"%PDF-1.7\n% text that can be read")
    assert "gzip" in why_no_text(b"\x1f\x8b\x08" + noise)
    assert "NUL" in why_no_text(b"a\0b")
    assert why_no_text(b"PAR1 is the first line") is None
    assert why_no_text(b"\xe9t\xe9") is None, "too short to judge"
