"""docs/tree.txt, the tree of docs/architecture.md: every module with the first line of its docstring, in import order.

SNAPSHOTS=update make snapshots      writes it again
"""

import ast
import os
from pathlib import Path

from tests.test_layers import ROWS

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/tree.txt"
WIDE = 34


def first_line(file: Path) -> str:
    """What a module says it is, without its name and its full stop."""
    said = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()
    return said[0].rstrip(".") if said else ""


def tree() -> str:
    """The tree as text."""
    lines = []
    for package, rows in ROWS.items():
        lines.append(f"{package}/")
        for row in rows:
            place = ROOT / "src" / package / row
            modules = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
            for file in modules:
                if file.is_file() and file.name != "__init__.py":
                    name = str(file.relative_to(ROOT / "src" / package))
                    lines.append(f"  {name:<{WIDE}} {first_line(file)}".rstrip())
    return "```text\n" + "\n".join(lines) + "\n```\n"


def test_tree():
    if os.environ.get("SNAPSHOTS") == "update":
        FILE.write_text(tree(), encoding="utf-8")
    assert FILE.read_text(encoding="utf-8") == tree()
