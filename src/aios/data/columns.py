"""Data sets in columns: .parquet files, and data sets of the Hugging Face hub, each through its optional package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aios.data.plain_text import LONGEST_RECORD
from aios.data.records import TEXT_FIELDS, no_text_field, parts_of, record_text
from aios.data.sources import PackageNeededError
from aios.data.unpacking import Allowance
from chronomoe.errors import DataError

_ROWS, _BUFFER = 32, 1 << 20
"""Rows, and bytes of a column, in memory at once."""


def parquet_documents(path: str, field: str | None) -> Iterator[str]:
    """The text of each row of a .parquet file; only the columns that hold it are read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PackageNeededError(path, "parquet") from None
    try:
        with pyarrow.OSFile(path) as source, pyarrow.parquet.ParquetFile(source, buffer_size=_BUFFER) as file:
            names = _text_columns(pyarrow.types, file.schema_arrow)
            field = field or next((name for name in TEXT_FIELDS if name in names), None)
            wanted = [] if field is None else parts_of(field, names)
            if field is None or not set(wanted) <= set(names):
                every = file.schema_arrow.names
                raise no_text_field(path, names, field, every, present=field in every)
            allowance, number = Allowance(path, source.size()), 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=wanted, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    text = record_text(record, field, place := f"{path}, row {number}")
                    if len(text) > LONGEST_RECORD:
                        raise DataError(f"{place} is longer than {LONGEST_RECORD:,} characters; divide it.")
                    allowance.spend(len(text))
                    yield text
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is a damaged or unsupported parquet file: {str(error).rstrip('.')}.") from error


def _text_columns(types: Any, schema: Any) -> list[str]:
    """The columns of text or of conversations, those of inner structures with a dot between the names."""
    found: list[str] = []

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
        return any(test(kind) for test in tests)

    def collect(columns: Any, before: str) -> None:
        for column in columns:
            kind, name = column.type, f"{before}{column.name}"
            if is_text(kind):
                found.append(name)
            elif types.is_struct(kind):
                collect(kind, f"{name}.")
            elif types.is_list(kind) or types.is_large_list(kind):
                inner = {one.name for one in kind.value_type} if types.is_struct(kind.value_type) else set()
                if inner & {"content", "value"}:
                    found.append(name)

    collect(schema, "")
    return found


def data_set_documents(path: str, field: str | None) -> Iterator[str]:
    """The text of each record of `hf:<data set>[:config][:split]`, streamed."""
    try:
        import datasets
    except ImportError:
        raise PackageNeededError(path, "datasets") from None
    name, config, split, *_ = [*path.removeprefix("hf:").lstrip("/").split(":"), None, None]
    try:
        for record in datasets.load_dataset(path=name, name=config, split=split or "train", streaming=True):
            yield record_text(record, field, path)
    except DataError:
        raise
    except Exception as error:  # whatever the network, the hub or a file format may raise
        raise DataError(f"{path} cannot be loaded: {error}") from error
