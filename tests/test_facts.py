"""The same fact once: a sentence for people, a setting's default or its bounds stand in one module."""

import ast
import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import aios.settings
import chronomoe.training
from chronomoe.settings import Settings, annotations_of, bounds_of

SRC = Path(__file__).parents[1] / "src"
FILES = sorted(SRC.rglob("*.py"))


def tree_of(file: Path) -> ast.Module:
    """A module's syntax, without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree


def sentences(tree: ast.AST) -> Iterator[str]:
    """Each text of three words or more that ends as a sentence; values filled in stand as {}."""
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(value) for value in node.values}
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        else:
            continue
        if len(re.findall(r"[^\W\d_]+", text)) >= 3 and text.rstrip().endswith((".", "?")):
            yield text.strip()


def number(node: ast.AST | None) -> float | None:
    """The value of a plain number."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = number(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    return None


def declared(tree: ast.AST) -> Iterator[tuple[str, float]]:
    """Name and number of each field of a class and each argument's default."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    value = number(line.value)
                    if value is not None:
                        yield line.target.id, value
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            plain = node.args.posonlyargs + node.args.args
            pairs = [*zip(plain[len(plain) - len(node.args.defaults) :], node.args.defaults, strict=True)]
            pairs += [
                (arg, default)
                for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                if default
            ]
            yield from ((arg.arg, value) for arg, default in pairs if (value := number(default)) is not None)


def bounded(tree: ast.AST) -> Iterator[str]:
    """Names of the fields that are declared with Bounds."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and "Bounds(" in ast.unparse(node.annotation)
        ):
            yield node.target.id


def settings() -> set[str]:
    """Names of everything a user can set: the fields of subclasses of Settings."""
    bases: dict[str, set[str]] = {}
    fields: dict[str, set[str]] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
                fields[node.name] = {
                    line.target.id
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                }

    def is_settings(name: str) -> bool:
        return name == "Settings" or any(is_settings(base) for base in bases.get(name, ()))

    return {field for name in fields if is_settings(name) for field in fields[name]}


def in_several(found: dict[object, set[str]]) -> list[str]:
    return sorted(f"{fact}: {', '.join(sorted(places))}" for fact, places in found.items() if len(places) > 1)


def test_a_sentence_stands_in_one_module() -> None:
    found: dict[object, set[str]] = defaultdict(set)
    for file in FILES:
        for text in sentences(tree_of(file)):
            found[text].add(str(file.relative_to(SRC)))
    assert in_several(found) == []


def test_a_settings_default_stands_in_one_module() -> None:
    found: dict[object, set[str]] = defaultdict(set)
    known = settings()
    for file in FILES:
        for name, value in declared(tree_of(file)):
            if name in known and value != 0:
                found[name, value].add(str(file.relative_to(SRC)))
    assert in_several(found) == []


def test_a_settings_bounds_stand_in_one_module() -> None:
    found: dict[object, set[str]] = defaultdict(set)
    for file in FILES:
        for name in bounded(tree_of(file)):
            found[name].add(str(file.relative_to(SRC)))
    assert in_several(found) == []


def test_facts_are_found() -> None:
    tree = ast.parse(
        'class A:\n    rate: Annotated[float, Bounds(gt=0)] = -3\ndef f(x, y=2):\n    print(f"Gave {x} to {y} now.")'
    )
    assert list(declared(tree)) == [("rate", -3.0), ("y", 2.0)]
    assert list(bounded(tree)) == ["rate"]
    assert list(sentences(tree)) == ["Gave {} to {} now."]


OTHER_BOUNDS = {("ACTv1Run", "moe_capacity_factor")}
"""Fields whose meaning differs in a subclass: 0 drops nothing there, as the founding text has it."""


def test_a_field_that_a_subclass_declares_again_keeps_its_bounds() -> None:
    for package in (aios.settings, chronomoe.training):
        for module in pkgutil.iter_modules(package.__path__):
            if package is aios.settings or module.name == "config":
                importlib.import_module(f"{package.__name__}.{module.name}")

    def below(kind: type[Settings]) -> Iterator[type[Settings]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    differing = {
        (kind.__name__, name)
        for kind in set(below(Settings))
        if kind.__module__.split(".")[0] in ("aios", "chronomoe")
        for name in vars(kind).get("__annotations__", {})
        for base in kind.__mro__[1:]
        if base is not Settings
        and issubclass(base, Settings)
        and name in annotations_of(base)
        and bounds_of(kind, name) != bounds_of(base, name)
    }
    assert differing == OTHER_BOUNDS
