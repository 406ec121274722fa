"""Words that must not appear: private names in code, turns of phrase in prose that a reader has to decode."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = re.compile(
    r"_?(look|looked_at|looked_with|hear|heard|hearing|asked|unasked\w*|thought|part|whole|agree|met|meet|attempt|aside|sure"
    r"|told|book|listening|put_away|temperate|usual|leave|well|fewest|enough|healing|waiting)",
    re.IGNORECASE,
)
"""Names that say nothing to somebody new."""
PHRASES = re.compile(
    r"see to (the|an?) |there (is|are) none of|that is none|\bwhoever\b|\banew\b|\b(is|are|was|be|been) (told|heard)\b"
    r"|steers nobody|let one rest",
    re.IGNORECASE,
)
PROSE = [
    *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("src/**/*.py")),
    *sorted(ROOT.glob("tests/**/snapshots/*.txt")),
]  # fmt: skip


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each function, class, argument, attribute and constant that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
    for scope in ast.walk(tree):
        if isinstance(scope, ast.Module | ast.ClassDef):
            for node in scope.body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                yield from ((node.lineno, target.id) for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("file", sorted(ROOT.glob("src/**/*.py")), ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_names_are_standard(file: Path) -> None:
    found = [(line, name) for line, name in names(ast.parse(file.read_text("utf-8"))) if NAMES.fullmatch(name)]
    assert not [*found, *filter(NAMES.fullmatch, [file.stem])]


@pytest.mark.parametrize("file", PROSE, ids=lambda file: str(file.relative_to(ROOT)))
def test_phrases_are_plain(file: Path) -> None:
    lines = enumerate(file.read_text("utf-8").splitlines(), 1)
    assert not [(number, line) for number, line in lines if PHRASES.search(line)]


def test_names_are_found_wherever_they_are_defined() -> None:
    source = "_WELL = 1\nclass Told:\n    heard: int = 0\n    def hear(self, asked): self.met = asked\n"
    found = {name for _, name in names(ast.parse(source)) if NAMES.fullmatch(name)}
    assert found == {"_WELL", "Told", "heard", "hear", "asked", "met"}
