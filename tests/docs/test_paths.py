"""Every file that a page names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
BEGINNINGS = [ROOT / place for place in ("", "src", "src/chronomoe", "src/aios", "docs", "examples")]
PATH = re.compile(r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|md|txt))?)`")
OURS = ("src/", "tests/", "docs/", "examples/", "chronomoe/", "aios/", "benchmarks/", "experiments/")
ROOMS = tuple(f"{room.name}/" for package in ("chronomoe", "aios") for room in (ROOT / "src" / package).iterdir())


def named(page: Path) -> set[str]:
    """Paths in backticks; of the list of names only those of the column that says where a thing is here."""
    lines = page.read_text(encoding="utf-8").splitlines()
    if page.name == "names.md":
        lines = [line.rpartition(" | ")[2] if line.startswith("|") else line for line in lines]
    found = {path for line in lines for path in PATH.findall(line)}
    return {path for path in found if path.startswith(OURS) or (path.startswith(ROOMS) and path.endswith(".py"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths(page):
    assert [path for path in sorted(named(page)) if not any((start / path).exists() for start in BEGINNINGS)] == []


def test_paths_are_found():
    assert {"chronomoe/control/pressure.py"} <= named(ROOT / "docs/mechanisms/pressure.md")
    assert "src/aios/core/hrm_models/moe_layer.py" not in named(ROOT / "docs/names.md")
