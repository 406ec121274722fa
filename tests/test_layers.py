"""The layers of both packages: a module imports only from rows above its own, type-only imports included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
ROWS = {
    "chronomoe": [
        "errors", "allocator", "storage", "tensors", "settings", "knob", "data", "routing", "control", "hosts",
        "experts", "goals", "sidecars", "pretrained", "mixtral_core", "chronovisor_mixtral_bridge", "hrm_shape",
        "hrm", "training",
    ],
    "aios": [
        "workspace", "goal_text", "sentence", "settings", "store", "data", "brains", "experts", "goals", "actions",
        "manager", "cli",
    ],
}  # fmt: skip
"""The rooms of each package, lowest first; docs/architecture.md says what is in each."""
MOST_LINES = 400
DEFERRED = {
    ("aios.actions.data", "aios.data.prepare"),
    ("aios.actions.workspace", "aios.brains.base"),
    ("aios.actions.brains", "aios.brains.loaded"),
    ("aios.actions.brains", "aios.brains.upcycle"),
    ("aios.actions.experts", "aios.brains.loaded"),
    ("aios.actions.experts", "aios.experts.attach"),
    ("aios.actions.experts", "aios.experts.exchange"),
    ("aios.actions.experts", "aios.experts.train"),
    ("aios.actions.experts", "aios.experts.use"),
    ("aios.actions.goals", "aios.brains.loaded"),
    ("aios.actions.goals", "aios.goals.explain"),
    ("aios.actions.goals", "aios.goals.teach"),
    ("aios.actions.goals", "aios.goals.use"),
    ("aios.actions.measure", "aios.brains.evaluate"),
    ("aios.actions.measure", "aios.brains.loaded"),
    ("aios.actions.measure", "aios.goals.use"),
    ("aios.actions.talk", "aios.brains.loaded"),
    ("aios.actions.talk", "aios.experts.use"),
    ("aios.actions.talk", "aios.goals.use"),
    ("aios.actions.talk", "chronomoe.hosts.capture"),
    ("aios.actions.train", "aios.brains.actv1"),
    ("aios.actions.train", "aios.brains.train"),
    ("aios.actions.train", "aios.experts.fresh"),
    ("aios.actions.train", "aios.goals.under"),
    ("aios.actions.workspace", "aios.brains.loaded"),
    ("aios.actions.workspace", "aios.brains.train"),
    ("aios.actions.workspace", "chronomoe.routing.dispatch"),
    ("aios.manager.command", "aios.manager.application"),
    ("aios.manager.worker", "aios.manager.worker_process"),
}
"""(module, module it imports inside a function): each keeps torch or numpy out of `--help`."""


def modules() -> dict[str, Path]:
    """Every module of src by name."""
    found = {}
    for file in sorted(SRC.rglob("*.py")):
        name = ".".join(file.relative_to(SRC).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, bool | None]]:
    """Our own modules that a module imports, and whether it does so inside a function; None: by a string."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool | None]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else str(node.module)), inside
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, found = node.value.partition(":")
            if colon and module in MODULES and found.isidentifier():  # "module:name", imported by whoever reads it
                yield module, None
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    for target, inside in walk(tree, False):
        if target in MODULES and target != name:
            yield target, inside


def room(name: str) -> tuple[str, str]:
    """Package and room of a module: `chronomoe.routing.fields` is in ("chronomoe", "routing")."""
    package, _, rest = name.partition(".")
    return package, rest.split(".")[0]


IMPORTS = {name: sorted(set(imports(name)), key=str) for name in MODULES}


def is_front(name: str) -> bool:
    """A package's own front (`chronomoe`, `aios.__main__`) names rooms without being in one."""
    return room(name)[1] in ("", "__main__")


def test_every_room_has_a_row() -> None:
    rooms = {room(name) for name in MODULES if not is_front(name)}
    assert rooms <= {(package, name) for package, names in ROWS.items() for name in names}


def test_imports_go_up_the_rows() -> None:
    wrong = []
    for name, targets in IMPORTS.items():
        for target, _ in targets:
            (package, mine), (other, theirs) = room(name), room(target)
            if is_front(name) or is_front(target):
                continue
            if package != other:
                if package == "chronomoe":
                    wrong.append(f"{name} -> {target}")
            elif mine != theirs and ROWS[package].index(theirs) > ROWS[package].index(mine):
                wrong.append(f"{name} -> {target}")
    assert not wrong, "\n".join(wrong)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected sets of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            circle = []
            while not circle or circle[-1] != node:
                circle.append(stack.pop())
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_circle_of_modules() -> None:
    graph = {
        name: {target for target, _ in targets if not is_front(target)}
        for name, targets in IMPORTS.items()
        if not is_front(name)
    }
    assert circles(graph) == []


def test_no_circle_of_packages() -> None:
    graph: dict[str, set[str]] = {".".join(room(name)): set() for name in MODULES if not is_front(name)}
    for name, targets in IMPORTS.items():
        for target, _ in targets:
            if not (is_front(name) or is_front(target)) and room(name) != room(target):
                graph[".".join(room(name))].add(".".join(room(target)))
    assert circles(graph) == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_is_short(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES


def test_imports_inside_functions_are_listed() -> None:
    deferred = {(name, target) for name, targets in IMPORTS.items() for target, inside in targets if inside}
    assert deferred == DEFERRED
    assert len(DEFERRED) < 30


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
