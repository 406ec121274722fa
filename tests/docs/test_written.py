"""What the docs take from the source.

docs/tree.txt: every module with the first line of its docstring, in import order. docs/versions.txt: every file format
with its version.

SNAPSHOTS=update make snapshots      writes them again
"""

import ast
import json
import os
from pathlib import Path

import pytest

from tests.test_layers import ROWS

ROOT = Path(__file__).parents[2]
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


def versions() -> str:
    """The table of formats: every FileFormat, and what is still declared as FORMAT, VERSION."""
    found = {}
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "FileFormat":
                given = {one.arg: one.value for one in node.keywords}
                name, version = ast.literal_eval(given["name"]), ast.literal_eval(given["version"])
            elif isinstance(node, ast.Assign) and "FORMAT, VERSION" in ast.unparse(node.targets[0]):
                name, version = ast.literal_eval(node.value)[:2]
            else:
                continue
            found[name] = (version, file.relative_to(ROOT))
    rows = [f"| `{name}` | {version} | `{file}` |" for name, (version, file) in sorted(found.items())]
    return "\n".join(["| format | version | written and checked in |", "|---|---|---|", *rows]) + "\n"


@pytest.mark.parametrize(("file", "make"), [("docs/tree.txt", tree), ("docs/versions.txt", versions)])
def test_written(file, make):
    if os.environ.get("SNAPSHOTS") == "update":
        (ROOT / file).write_text(make(), encoding="utf-8")
    assert (ROOT / file).read_text(encoding="utf-8") == make()


def test_first_changes_name_files_that_are_there():
    """first_changes.json: where ten changes belong that somebody new may want, as asked of newcomers."""
    wanted = json.loads((ROOT / "tests/docs/first_changes.json").read_text(encoding="utf-8"))
    files = [file for places in wanted.values() for file in places]
    assert len(wanted) == 10
    assert max(map(len, wanted.values())) <= 3
    assert [file for file in files if not (ROOT / file).is_file()] == ["src/aios/manager/data_page.py"]  # a new one
