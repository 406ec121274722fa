import pytest

from chronomoe.errors import DataError


def test_tables(tmp_path, read):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"two\nlines, ""quoted"""\n2,\n3,plain 5" pipe\n\n4\n')
    assert read(path) == ['two\nlines, "quoted"', 'plain 5" pipe']
    path.write_text("id,body\n1,x\n")
    with pytest.raises(DataError, match=r"no obvious text field; choose one of 'id', 'body' with --field"):
        read(path)
    with pytest.raises(DataError, match=r"no field 'text'; choose one of 'id', 'body'"):
        read(path, field="text")
    assert read(path, field="body") == ["x"]
    (tmp_path / "a.tsv").write_text("text\tn\na,b\t1\n")
    assert read(tmp_path / "a.tsv") == ["a,b"]
    for data in ("", "\n\n", "text\n"):
        path.write_text(data)
        with pytest.raises(DataError, match="holds no text"):
            read(path)


def test_a_quote_that_never_closes_is_named(cases, read, tmp_path):
    with pytest.raises(
        DataError, match=r"open-quote\.csv, row 7 \(line 8\) opens a quote in column 'text'.*--no-quotes"
    ):
        read(cases / "open-quote.csv")
    with pytest.raises(DataError, match=r"row 1 \(line 2\) has 4 cells and the header 2.*leave out --no-quotes"):
        read(cases / "open-quote.csv", quotes=False)
    path = tmp_path / "a.csv"
    path.write_text('text,id\nplain,1\n"two\nlines",2\n"open,3\nplain,4\n')
    with pytest.raises(DataError, match=r"row 3 \(line 5\) opens a quote in column 'text'"):
        read(path)
    path.write_text('text,id\n"5"" nails, 3",1\n"6" nails,2\n')
    with pytest.raises(DataError, match=r"row 2 \(line 3\) opens a quote in column 'text'"):
        read(path)
    path.write_text('text;id\n"6" nails;2\n')
    assert read(path, quotes=False) == ['"6" nails']
    path.write_text('id,"text\n1,x\n')
    with pytest.raises(DataError, match=r"the header \(line 1\) opens a quote in column 2"):
        read(path)


def test_tab_separated_text_has_no_quotes_unless_asked_for(cases, read, tmp_path):
    texts = read(cases / "cells.tsv")
    assert len(texts) == 25
    assert sum(text.startswith('"') for text in texts) == 5
    with pytest.raises(DataError, match=r"row 5 \(line 6\) opens a quote in column 'text'"):
        read(cases / "cells.tsv", quotes=True)
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"two\nlines"\n')
    assert read(tmp_path / "a.tsv", quotes=True) == ["two\nlines"]


def test_byte_order_mark_line_ends_and_delimiters(cases, read, tmp_path):
    path = cases / "bom-crlf-semicolon.csv"
    texts = read(path, field="body")
    assert len(texts) == 20
    assert not any("\r" in text or ";" in text for text in texts)
    with pytest.raises(DataError, match="choose one of 'id', 'body' with --field"):
        read(path)
    for number, (name, delimiter, end) in enumerate(
        [
            ("a.csv", "|", "\n"),
            ("b.csv", "\t", "\r"),
            ("c.tsv", ";", "\r\n"),
            ("d.tsv", ",", "\n"),
            ("e.csv", ",", "\r"),
        ]
    ):
        rows = [["id", "text"], [str(number), "some words"], ["", "more words"]]
        (tmp_path / name).write_bytes(end.join(map(delimiter.join, rows)).encode("utf-8-sig"))
        assert read(tmp_path / name) == ["some words", "more words"], name
    (tmp_path / "f.csv").write_text('"a,b,c";text\n1;x, y\n')
    assert read(tmp_path / "f.csv") == ["x, y"], "what is quoted is not counted"
    (tmp_path / "g.csv").write_text("sep=;\nid; text\n1;a\n2;b;c\n")
    with pytest.raises(
        DataError, match=r"row 2 \(line 4\) has 3 cells and the header 2; quote the cell that holds a semi"
    ):
        read(tmp_path / "g.csv")


def test_a_row_of_more_cells_than_columns_is_named(tmp_path, read):
    (tmp_path / "a.csv").write_text("id,text\n1,fine,,\n2,cut, here\n")
    with pytest.raises(DataError, match=r"a\.csv, row 2 \(line 3\) has 3 cells and the header 2; quote the cell"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("id,text\n1,fine,,\n")
    assert read(tmp_path / "a.csv") == ["fine"]


def test_an_open_quote_in_a_large_table_is_found_in_bounded_memory(tmp_path, read, monkeypatch):
    monkeypatch.setattr("aios.data.tables.LONGEST_RECORD", 10_000)
    (tmp_path / "a.csv").write_text('id,text\n1,fine\n2,"open\n' + "3,more words\n" * 10_000)
    with pytest.raises(DataError, match=r"row 2 \(line 3\) opens a quote in column 'text'"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("id,text\n1," + "x" * 20_000 + "\n")
    with pytest.raises(DataError, match=r"row 1 \(line 2\) is not a table row \(it is longer than 10,000 characters\)"):
        read(tmp_path / "a.csv")
