"""Tables as text files: .csv and .tsv, of whatever delimiter; a row that does not fit is named, never dropped."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain

from aios.data.plain_text import LONGEST_RECORD
from aios.data.records import TEXT_FIELDS, no_text_field, parts_of
from aios.data.sources import FlagNeededError

_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}
_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
_DECLARED = re.compile(r"sep=(.)\n?")


def table_documents(
    where: str, lines: Iterable[str], suffix: str, *, field: str | None, quotes: bool | None
) -> Iterator[str]:
    """The text of each row. Cells may be quoted in .csv and may not in .tsv, unless ``quotes`` says otherwise."""
    quoted = suffix == ".csv" if quotes is None else quotes
    rest = enumerate(lines, start=1)
    number, first = next(((number, line) for number, line in rest if not line.isspace()), (0, ""))
    if declared := _DECLARED.fullmatch(first):  # as spreadsheets tell one another
        delimiter = declared[1]
        number, first = next(rest, (0, ""))
    else:
        delimiter = _delimiter(first, _DELIMITERS[suffix], quoted)
    if not first:
        return
    rows = _Rows(where, chain([first], (line for _, line in rest)), number, delimiter, quoted)
    names = [name.strip() for name in next(rows)]
    rows.names = names
    columns = [names.index(name) for name in _columns(where, names, field)]
    for row in rows:
        if len(row) > len(names) and any(row[len(names) :]):
            flag = "" if quoted else ", and leave out --no-quotes" if suffix == ".csv" else ", and add --quotes"
            raise FlagNeededError(
                f"{rows.place} has {len(row)} cells and the header {len(names)}",
                f"quote the cell that holds a {_NAMES.get(delimiter, repr(delimiter))}{flag}",
            )
        yield "".join(row[column] for column in columns if column < len(row))


def _delimiter(header: str, candidates: str, quoted: bool) -> str:
    """The most frequent candidate outside of quotes; the first where there is none."""
    bare = re.sub(r'"[^"]*"', "", header) if quoted else header
    if candidates[0] == "\t" and "\t" in bare:
        return "\t"
    return max(candidates, key=bare.count)


def _columns(where: str, names: list[str], field: str | None) -> list[str]:
    wanted = list(TEXT_FIELDS[:1]) if field is None else parts_of(field, names)
    if not set(wanted) <= set(names):
        raise no_text_field(where, names, field, names)
    return wanted


class _Rows(Iterator[list[str]]):
    """Rows of cells; one whose quotes do not close is an error that names row, line and column."""

    def __init__(self, where: str, lines: Iterable[str], first: int, delimiter: str, quoted: bool) -> None:
        self.names: list[str] = []
        """The columns; empty while the header is read."""
        self._where, self._delimiter = where, delimiter
        self._lines: list[str] = []  # of the row at hand
        self._line, self._row = first - 1, 0
        csv.field_size_limit(LONGEST_RECORD + 1)
        self._cells = csv.reader(
            self._fed(lines),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )

    @property
    def place(self) -> str:
        """The row at hand."""
        row = f"row {self._row}" if self.names else "the header"
        return f"{self._where}, {row} (line {self._line - max(0, len(self._lines) - 1)})"

    def __next__(self) -> list[str]:
        while True:
            self._lines = []
            self._row += bool(self.names)
            try:
                row = next(self._cells)
            except csv.Error as error:
                raise self._broken(str(error)) from error
            if row:
                return row
            self._row -= 1  # a blank line is no row

    def _fed(self, lines: Iterable[str]) -> Iterator[str]:
        size = 0
        for line in lines:
            size = len(line) + (size if self._lines else 0)
            self._lines.append(line)
            self._line += 1
            if size > LONGEST_RECORD:
                raise self._broken(f"it is longer than {LONGEST_RECORD:,} characters")
            yield line

    def _broken(self, why: str) -> FlagNeededError:
        column = self._open_column()
        if column is None:
            return FlagNeededError(f"{self.place} is not a table row ({why})", "mend or remove it")
        name = repr(self.names[column]) if column < len(self.names) else str(column + 1)
        return FlagNeededError(
            f"{self.place} opens a quote in column {name} that does not close at the end of that cell",
            "close it, or add --no-quotes if quotes mean nothing there",
        )

    def _open_column(self) -> int | None:
        """The column of the cell at which reading broke off, if that is quoted."""
        text, position = "".join(self._lines), 0
        for column in range(len(text)):
            if text.startswith('"', position):
                cell = re.compile(r'"(?:[^"]|"")*"').match(text, position)
                after = cell.end() if cell else len(text)
                if not cell or (after < len(text) and text[after] not in (self._delimiter, "\n")):
                    return column
            else:
                after = min(
                    (at for at in (text.find(self._delimiter, position), text.find("\n", position)) if at >= 0),
                    default=len(text),
                )
            if after >= len(text) or text[after] == "\n":
                return None
            position = after + 1
        return None
