"""The project's own files: what is declared is what is used, and a fact stands once."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import chronomoe

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def plain(requirement: str) -> str:
    """The name of a requirement, as pip compares it."""
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def imported() -> set[str]:
    """Every package that src imports, wherever in a module, other than ours and Python's own."""
    found = set()
    for file in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return {
        plain(name) for name in found - set(sys.stdlib_module_names) - {"aios", "chronomoe", "compression"}
    }  # that is Python 3.14's


def test_every_import_is_declared():
    declared = {plain(one) for one in PROJECT["dependencies"]}
    for extra in PROJECT["optional-dependencies"].values():
        declared |= {plain(one).partition(".")[0] for one in extra}
    assert imported() - declared == set()


def test_every_dependency_is_imported():
    assert {plain(one) for one in PROJECT["dependencies"]} - imported() == set()


def test_every_extra_that_is_named_exists():
    texts = [*SRC.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = {extra for file in texts for extra in re.findall(r"chronomoe-aios\[([\w,-]+)\]", file.read_text())}
    assert {one for names in named for one in names.split(",")} <= set(PROJECT["optional-dependencies"])


def test_every_declared_package_that_make_installs_is_pinned():
    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = PROJECT["optional-dependencies"]
    installed = [
        *PROJECT["dependencies"],
        *(
            one
            for name in ("plots", "tensorboard", "manager", "parquet", "zstd", "docs", "web-tests", "dev", "8bit")
            for one in extras[name]
        ),
    ]
    assert {plain(one) for one in installed} - pinned == set()
    assert (ROOT / "constraints.txt").read_text().split("\n")[1] == "torch==2.13.0"


def test_the_version_is_stated_once():
    assert "version" in PROJECT["dynamic"]
    written = [file for file in SRC.rglob("*.py") if f'"{chronomoe.__version__}"' in file.read_text()]
    assert written == [SRC / "chronomoe/__init__.py"]


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_workflow_calls_only_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    runs = re.findall(r"run: (.*)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert runs
    for line in runs:
        words = line.split()
        assert words[0] == "make"
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
