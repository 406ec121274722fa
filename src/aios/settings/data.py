"""Settings of `aios data prepare`, and of reading text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from chronomoe.settings import Bounds, Count, Settings

VocabSize = int | Literal["bytes"]
VOCAB_SIZE = 4096
"""Tokens of a tokenizer that is trained here."""


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """How documents are found in files."""

    field: str | None = None
    """Column or key that holds the text; a.b is b within a, a+b both together."""
    quotes: bool | None = None
    """May cells of a table be quoted? [in .csv yes, in .tsv no]"""
    skip_damaged: bool = False
    """Leave out damaged files of folders and archives, each named, instead of stopping."""
    ascii_only: Annotated[bool, Parameter(parse=False)] = False
    """Leave out lines with other than ASCII characters."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Reading):
    """How text becomes prepared data."""

    tokenizer: Path | None = None
    """Folder of the tokenizer, for example artifacts/hf_implant/base_model; trained on the text when not given."""
    vocab_size: VocabSize = VOCAB_SIZE
    """Size of the tokenizer to train, or "bytes"."""
    heldout_fraction: Annotated[float, Bounds(gt=0, lt=0.5)] = 0.05
    """Share of the documents kept for evaluation."""
    max_heldout_bytes: Annotated[Count, Parameter(parse=False)] = 1_000_000
    """At most this much text held out per domain."""
    overwrite: bool = False
    """Replace prepared data that is already there."""
