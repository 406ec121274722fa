"""What the tests of readers share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aios.data.readers import read_documents
from aios.data.sources import Source, Tally
from aios.settings.data import Reading


@pytest.fixture
def read() -> Callable[..., list[str]]:
    """All documents of a path, read with these settings."""

    def call(path: Path | str, tally: Tally | None = None, **reading: Any) -> list[str]:
        return list(read_documents(Source(name="x", path=str(path)), Reading(**reading), tally))

    return call


@pytest.fixture
def cases() -> Path:
    """Small inputs that reports of other projects came down to; their README says what is right."""
    return Path(__file__).parents[2] / "fixtures/cases"
