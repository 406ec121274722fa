"""Kills at named points of every change of a workspace: nothing lost, the next command heals.

    python -m tests.long.kills            200 kills, some ten minutes; what this code has passed is not done again
    python -m tests.long.kills --few 10   ten of them, spread over all scenarios; nothing is written

A scenario is one change. It is done once in a copy of a small workspace, which counts its points: each call of a
function that changes the disk (``PRIMITIVES``), and each COMMIT. Then for every kill a forked process does the same in
a fresh copy and ends itself by SIGKILL just before or after the n-th call of one of them. Attaching an expert and
saving a brain in training are in ``kills_of_brains``. What is then checked:

- the workspace is what it was before the change, or what it is after it;
- registry.json says what aios.db says, and no folder is set aside;
- the change, done again, leads to what it is after it;
- an expert that is created under the name of a deleted one has none of its goals.

``kills-result.json`` beside this script holds the points of the last run and what was found.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from aios.store import database
from aios.store.entry import ExpertEntry
from aios.store.experts import Registry
from aios.store.goals import Goals
from chronomoe.errors import ChronoMoEError

KILLS = 200
RESULT = Path(__file__).with_name("kills-result.json")
PRIMITIVES: tuple[tuple[Any, str], ...] = (
    (os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (shutil, "rmtree"),
)  # fmt: skip
State = dict[str, Any]
Change = Callable[[Path], object]


# -- the workspace and its changes ---------------------------------------------------------------------------


def build_workspace(root: Path) -> None:
    """Three trained experts, one below another, with goals, and a brain that is no more than its name."""
    for expert_id in ("a", "b", "c"):
        train(root, expert_id, goals=(f"goal of {expert_id}", "goal of all"))
    registry, goals = Registry(root), Goals(root)
    registry.set_parent("b", "a")
    registry.note_attached("c", "mixtral/small")
    goals.add("goal of a slot", expert="mixtral/small:2.5", weight=0.5)
    goals.add("goal of nobody")


def train(root: Path, expert_id: str, goals: tuple[str, ...] = ()) -> None:
    """Write an expert's weights and enter its next version, as training does."""
    folder = root / "artifacts/experts" / expert_id
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "expert.safetensors"
    if not path.exists():
        path.write_text(f"weights of {expert_id}")
    Registry(root).upsert(ExpertEntry(expert_id=expert_id, checkpoint_path=str(path.resolve()), goals=goals))


def edit(root: Path) -> None:
    """Enter an expert by hand in registry.json, and let the next change import it."""
    file = Registry(root).file
    top = json.loads(file.read_text())
    if "by-hand" not in {one["expert_id"] for one in top["experts"]}:
        top["experts"].append({"expert_id": "by-hand", "goals": ["goal of all"]})
        file.write_text(json.dumps(top))
    Registry(root).freeze("a")


SCENARIOS: dict[str, Change] = {
    "create": lambda root: Registry(root).create("d", goals=["goal of d", "goal of all"], parent="a"),
    "train": lambda root: train(root, "a", goals=("goal of more",)),
    "freeze": lambda root: Registry(root).freeze("a"),
    "use": lambda root: Registry(root).record_use("a", 10, 0.5),
    "set parent": lambda root: Registry(root).set_parent("c", "b"),
    "rename": lambda root: Registry(root).rename("a", "better"),
    "delete": lambda root: Registry(root).delete("b"),
    "delete with children": lambda root: Registry(root).delete("a", "cascade"),
    "add a goal": lambda root: Goals(root).add("goal of c, new", expert="c"),
    "unlink a goal": lambda root: Goals(root).unlink(1),
    "remove a goal": lambda root: Goals(root).remove(2),
    "move slots": lambda root: Goals(root).brain_moved("mixtral/small", "mixtral/big"),
    "import": edit,
    "first change": lambda root: Registry(root).freeze("old"),
}
"""Every change; a repeated one may be refused, since it was made."""


def before_any_database(root: Path) -> None:
    """A workspace that knows no more than a registry of version 1.0."""
    file = Registry(root).file
    shutil.rmtree(root / "artifacts")
    file.parent.mkdir(parents=True)
    experts = [{"expert_id": "old", "goals": ["goal of old"], "taste": [1]}, {"expert_id": "older"}]
    file.write_text(json.dumps({"version": "1.0", "experts": experts}))


# -- what a workspace holds ----------------------------------------------------------------------------------


def state_of(root: Path, known: dict[str, str]) -> State:
    """What the workspace knows, by names; ``known`` gives each uid that was there before the change a name."""
    registry, goals = Registry(root), Goals(root)
    entries = registry.entries()
    ids = {one.expert_uid: one.expert_id for one in entries}
    experts = {}
    for one in entries:
        weights = root / one.checkpoint_path
        experts[one.expert_id] = {
            "was": known.get(one.expert_uid, "new"), "version": one.version, "frozen": one.is_frozen,
            "used": one.total_activations, "parent": one.parent_expert_id, "attached": [*one.attached_to],
            "goals": sorted(one.goals), "weights": digest(weights) if one.checkpoint_path else "",
        }  # fmt: skip
    found = {
        goal.text: [goal.weight, goal.active, sorted(ids.get(link, link) for link in goal.experts)]
        for goal in goals.all(active_only=False)
    }
    return {"experts": experts, "goals": found, "deleted": registry.stats()["deleted"]}


def digest(file: Path) -> str:
    """A hash of what a file holds."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def faults(root: Path) -> list[str]:
    """Where registry.json and aios.db, read without any of our code, differ; and what a kill has left."""
    registry, found = Registry(root), []
    top = json.loads(registry.file.read_text())
    if registry.database.exists():
        with closing(sqlite3.connect(registry.database)) as connection:
            if connection.execute("PRAGMA user_version").fetchone() == (0,):
                return []  # killed before there was a table
            rows = connection.execute("SELECT expert_id, expert_uid, is_frozen, version FROM experts ORDER BY number")
            experts = [list(row) for row in rows]
            links = connection.execute(
                "SELECT expert_uid, text FROM links JOIN goals ON id = goal_id WHERE slot IS NULL"
            ).fetchall()
            ((revision,),) = connection.execute("SELECT revision FROM registry").fetchall() or [(None,)]
        if revision is not None:
            names = ("expert_id", "expert_uid", "is_frozen", "version")
            if [[one[name] for name in names] for one in top["experts"]] != experts or top["revision"] != revision:
                found.append("registry.json does not say what aios.db says of the experts")
            if {(one["expert_uid"], text) for one in top["experts"] for text in one["goals"]} != set(links):
                found.append("registry.json does not say what aios.db says of the goals")
    if any(registry.home.glob(".aside-*")):
        found.append("a folder is still set aside")
    return found


# -- points and kills ----------------------------------------------------------------------------------------


@contextmanager
def watched(reached: Callable[[str, str], None]) -> Iterator[None]:
    """Call ``reached(point, "before" or "after")`` around each call of a primitive, within this context."""
    calls: Counter[str] = Counter()

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            if name == "os.mkdir" and os.path.isdir(words[0]):
                return function(*words, **options)  # it changes nothing
            calls[name] += 1
            point = f"{name} {calls[name]}"
            reached(point, "before")
            done = function(*words, **options)
            reached(point, "after")
            return done

        return call

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *words: Any) -> sqlite3.Cursor:
            if sql != "COMMIT":
                return super().execute(sql, *words)
            found: sqlite3.Cursor = around("COMMIT", super().execute)(sql, *words)
            return found

    originals = [(place, name, getattr(place, name)) for place, name in PRIMITIVES]
    connect = sqlite3.connect
    try:
        for place, name, function in originals:
            setattr(place, name, around(f"{place.__name__}.{name}", function))
        database.sqlite3.connect = lambda *words, **options: connect(*words, factory=Connection, **options)  # type: ignore[misc, assignment, attr-defined]
        yield
    finally:
        database.sqlite3.connect = connect  # type: ignore[misc, attr-defined]
        for place, name, function in originals:
            setattr(place, name, function)


def points_of(change: Change, root: Path) -> list[str]:
    """Do a change in a process of its own, and name every point at which it can be killed."""

    def call() -> list[str]:
        found: list[str] = []
        with watched(lambda point, when: found.append(f"{when} {point}")):
            change(root)
        return found

    points: list[str] = in_child(call)
    return points


def be_quiet() -> None:
    """Write nothing more to standard output and error."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns as JSON in a forked process; its :class:`ChronoMoEError` as the text of one here."""
    with tempfile.NamedTemporaryFile("r") as answer:
        child = os.fork()
        if child == 0:
            be_quiet()
            try:
                found = {"found": function()}
            except BaseException as error:
                found = {
                    "error" if isinstance(error, ChronoMoEError) else "failure": f"{type(error).__name__}: {error}"
                }
            Path(answer.name).write_text(json.dumps(found, default=str))
            os._exit(0)
        os.waitpid(child, 0)
        outcome = json.load(answer)
    if "found" not in outcome:
        raise (ChronoMoEError if "error" in outcome else RuntimeError)(*outcome.values())
    return outcome["found"]


def kill(change: Change, root: Path, point: str) -> bool:
    """Do a change in a process that kills itself at a point; was it reached?"""

    def reached(name: str, when: str) -> None:
        if f"{when} {name}" == point:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        be_quiet()
        try:
            with watched(reached):
                change(root)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


class Scenario:
    """One change, the workspace before it and what it leads to."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder / name.replace(" ", "-")
        self.start = self.folder / "start"
        self.build(self.start)
        self.known = {one.expert_uid: one.expert_id for one in Registry(self.start).entries()}
        self.old = self.state(self.start)
        after = self.copy("after")
        self.points = points_of(self.change, after)
        self.new = self.state(after)

    def build(self, root: Path) -> None:
        """Make the workspace."""
        build_workspace(root)
        if self.name == "first change":
            before_any_database(root)

    def change(self, root: Path) -> object:
        """Do the change."""
        return SCENARIOS[self.name](root)

    def state(self, root: Path) -> State:
        """What the workspace holds; reads it as the next command would."""
        return state_of(root, self.known)

    def is_between(self, state: State) -> bool:
        """May a kill leave this beside the old and the new?"""
        return self._is_edited(state)

    def copy(self, name: str) -> Path:
        """A fresh copy of the workspace."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        return Path(shutil.copytree(self.start, place))

    def check(self, point: str) -> list[str]:
        """Kill the change at a point; what was wrong afterwards."""
        root = self.copy("killed")
        if not kill(self.change, root, point):
            return ["the point was not reached"]
        state = self.state(root)  # the next command
        wrong = [] if state in (self.old, self.new) or self.is_between(state) else ["neither the old nor the new"]
        wrong += [] if self._is_edited(state) else faults(root)
        try:
            in_child(lambda: self.change(root) and None)
        except ChronoMoEError as error:
            if state != self.new:
                wrong.append(f"the change cannot be made again: {error}")
        if self.name not in ("train", "use") and self.state(root) != self.new:
            wrong.append("made again, the change leads elsewhere")
        return wrong + faults(root) + self._names(root)

    def _is_edited(self, state: State) -> bool:
        """Does a reader see the file that was edited, which the next change imports?"""
        return (
            self.name in ("import", "first change")
            and state not in (self.old, self.new)
            and "by-hand" in state["experts"]
        )

    def _names(self, root: Path) -> list[str]:
        """Goals never pass to another expert of the same name."""
        registry = Registry(root)
        wrong = []
        for expert_id in self.known.values():
            if expert_id not in {one.expert_id for one in registry.entries()}:
                entry = registry.create(expert_id)
                if entry.goals or Goals(root).for_expert(expert_id) or entry.expert_uid in self.known:
                    wrong.append(f"a new expert {expert_id} has goals of the old")
        return wrong


def spread(points: dict[str, list[str]], number: int) -> list[tuple[str, str]]:
    """So many points, as even over the scenarios as can be; always the same."""
    rng = random.Random(0)
    shuffled = [[(name, point) for point in rng.sample(found, len(found))] for name, found in points.items()]
    return [one for turn in itertools.zip_longest(*shuffled) for one in turn if one is not None][:number]


def run(number: int, folder: Path, known: dict[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """Kill ``number`` times; after each kill, what was wrong by scenario and point. ``known`` are not tried again."""
    from tests.long.kills_of_brains import Attach, Save

    scenarios = {name: Scenario(name, folder) for name in SCENARIOS}
    scenarios |= {"attach": Attach("attach", folder), "save": Save("save", folder)}
    found: dict[str, list[str]] = {}
    for name, point in spread({name: one.points for name, one in scenarios.items()}, number):
        kill = f"{name}: {point}"
        found[kill] = known[kill] if kill in known else scenarios[name].check(point)
        yield found


def digest_of_source() -> str:
    """A hash of all modules of src: a result belongs to the code that it was found with."""
    files = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main(words: list[str]) -> int:
    """Run the command; 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=0)
    few = parser.parse_args(words).few
    source = digest_of_source()
    saved = {} if few or not RESULT.exists() else json.loads(RESULT.read_text())
    known = saved["kills"] if saved.get("source") == source else {}  # what other code did says nothing of this
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for found in run(few or KILLS, Path(folder), known):
            if not few:
                wrong = sum(map(bool, found.values()))
                summary = {"source": source, "number": len(found), "wrong": wrong, "kills": found}
                RESULT.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{len(found)} kills, {sum(map(bool, found.values()))} wrong")
    for kill, what in found.items():
        if what:
            print(f"{kill}: {'; '.join(what)}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
