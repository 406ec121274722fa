"""Goals and links in the database: what it keeps, what it refuses, and what it says when it cannot be used."""

import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from aios.goal_text import fitted_text, goal_text
from aios.store import database as module
from aios.store.entry import ExpertEntry
from aios.store.tables import ExpertTable, GoalTable
from chronomoe.errors import CheckpointError, ConfigError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "art?ifacts #1/aios.db"


@pytest.fixture
def change(file):
    """Do one thing to the database, and commit it."""

    def call(name, *words, **options):
        with changing(file) as store:
            done = getattr(store, name)(*words, **options)
            store._sql.execute("COMMIT")
            return done

    return call


@contextmanager
def changing(file):
    with module.change(file) as sql:
        yield GoalTable(sql)


def goals(file):
    with module.read(file) as sql:
        return GoalTable(sql).all()


def test_reading_creates_nothing(file):
    assert goals(file) == []
    assert not file.parent.exists()


def test_a_goal(file, change):
    goal_id, new = change("add", "  Read laws ", source="cli")
    assert new
    (goal,) = goals(file)
    assert (goal.id, goal.text, goal.weight, goal.active, goal.source) == (goal_id, "Read laws", 1.0, True, "cli")
    assert goal.created_ts == goal.updated_ts
    assert len(goal.created_ts) == len("2025-10-12T10:00:00Z")
    assert goal.experts == ()


def test_a_text_that_is_there_is_the_same_goal_and_active_again(file, change):
    first, _ = change("add", "Read laws", weight=0.5, source="cli")
    change("set_active", first, False)
    assert not goals(file)[0].active
    assert change("add", "Read laws ", source="training") == (first, False)
    (goal,) = goals(file)
    assert (goal.active, goal.weight, goal.source) == (True, 0.5, "cli")
    change("add", "Read laws", weight=0.25, source="cli")
    assert goals(file)[0].weight == 0.25


def test_newest_first_and_ids_are_not_used_again(file, change):
    first, second = change("add", "a", source="cli")[0], change("add", "b", source="cli")[0]
    assert [goal.id for goal in goals(file)] == [second, first]
    change("remove", second)
    assert change("add", "b", source="cli")[0] > second


def test_links(file, change):
    first, second = change("add", "a", source="cli")[0], change("add", "b", source="cli")[0]
    for goal_id, expert in [(second, "x:0.0"), (first, "x:0.0"), (first, "y:0.0"), (first, "y:0.0")]:
        change("link", goal_id, expert)
    assert [goal.experts for goal in goals(file)] == [("x:0.0",), ("x:0.0", "y:0.0")]
    change("move_slot", "x:0.0", "y:0.0")
    assert [goal.experts for goal in goals(file)] == [("y:0.0",), ("y:0.0",)]
    change("unlink", first, "y:0.0")
    change("unlink", first, "y:0.0")
    assert [goal.experts for goal in goals(file)] == [("y:0.0",), ()]
    change("move_slot", "y:0.0", None)
    assert [goal.experts for goal in goals(file)] == [(), ()]


def test_an_expert_takes_its_links_along(file, change):
    goal_id, _ = change("add", "a", source="cli")
    entries = [ExpertEntry(expert_id=name) for name in "ab"]
    with module.change(file) as sql:
        for entry in entries:
            ExpertTable(sql).save(entry)
            GoalTable(sql).link(goal_id, entry.expert_uid)
        assert ExpertTable(sql).find("b").goals == ("a",)
        sql.execute("COMMIT")
    with module.change(file) as sql:
        ExpertTable(sql).remove(entries[0])
        sql.execute("COMMIT")
    assert goals(file)[0].experts == (entries[1].expert_uid,)
    with pytest.raises(CheckpointError, match="FOREIGN KEY"):
        change("link", goal_id, "0" * 32)
    change("remove", goal_id)
    with module.read(file) as sql:
        assert ExpertTable(sql).find("b").goals == ()


def test_an_expert_comes_back_as_it_was_saved(file):
    entry = ExpertEntry(
        expert_id="a", name="A", description="d", category="c", created_at="2025", last_trained="2026", version=3,
        training_datasets=("x", "y"), performance_metrics={"bits": {"after": 1.5, "none": None}}, total_activations=7,
        avg_routing_weight=0.25, is_active=False, is_frozen=True, model_architecture="gated", checkpoint_path="p",
        base_fingerprint="b", tokenizer_fingerprint="t", attached_to=("mixtral/small",), training_config={"rank": 4},
        extra={"taste": [1, None, "\u2603"]},
    )  # fmt: skip
    with module.change(file) as sql:
        ExpertTable(sql).save(entry)
        assert ExpertTable(sql).all() == {"a": entry}
        ExpertTable(sql).save(replace(entry, expert_id="b", extra={}))
        assert ExpertTable(sql).all() == {"b": replace(entry, expert_id="b", extra={})}


def test_what_is_not_committed_is_undone(file, change):
    change("add", "a", source="cli")
    with changing(file) as store:
        store.add("b", source="cli")
    with pytest.raises(ConfigError), changing(file) as store:
        store.add("c", source="cli"), store.add("", source="cli")
    assert [goal.text for goal in goals(file)] == ["a"]


@pytest.mark.parametrize(
    "text", ["'; DROP TABLE goals; --", '"', "%", "_", "a\\b", "?", "{x}", "☃ für Anfänger", "x" * 1000]
)
def test_text_is_just_text(file, change, text):
    change("add", text, source="cli")
    change("link", 1, f"{text}:0.0")
    (goal,) = goals(file)
    assert (goal.text, goal.experts) == (text, (f"{text}:0.0",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(("", "needs words"), (" \n", "needs words"), ("x" * 1001, "at most 1,000"), ("x" * 10_000, "has 10,000")),
        *(
            ("a\nb", "control"),
            ("a\0", "control"),
            ("\x1b[2J!", "control"),
            ("a\u2028b", "control"),
            ("\ud800", "Unicode"),
        ),
    ],
)
def test_text_that_is_no_goal(file, change, text, said):
    with pytest.raises(ConfigError, match=said):
        change("add", text, source="cli")
    assert goals(file) == []
    fitted = fitted_text(text)
    assert not fitted or goal_text(fitted) == fitted


@pytest.mark.parametrize("weight", [0, -1, 1.01, float("nan"), float("inf")])
def test_weights_that_cannot_be(file, change, weight):
    with pytest.raises(ConfigError, match="weight of a goal"):
        change("add", "a", weight=weight, source="cli")
    assert goals(file) == []


def test_how_the_file_is_kept(file, change):
    change("add", "a", source="cli")
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA user_version").fetchone() == (module.latest(),)
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute("UPDATE goals SET weight = 2")
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute("UPDATE goals SET active = 'maybe'")
    with pytest.raises(sqlite3.IntegrityError):  # the tables are strict
        connection.execute("UPDATE goals SET text = x'00'")
    connection.close()
    with changing(file) as store:
        assert store._sql.execute("PRAGMA foreign_keys").fetchone() == (1,)
        assert store._sql.execute("PRAGMA synchronous").fetchone() == (2,)


# -- schemas -------------------------------------------------------------------------------------------------


def test_a_newer_schema_is_refused_and_not_touched(file, change):
    change("add", "a", source="cli")
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = file.read_bytes()
    for refused in (lambda: goals(file), lambda: change("add", "b", source="cli")):
        with pytest.raises(CheckpointError, match="newer version of aios") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


def test_the_database_of_version_0_1_0_is_refused_and_not_touched(file, change):
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE goals (id INTEGER PRIMARY KEY)")
        connection.execute("PRAGMA user_version = 1")
    before = file.read_bytes()
    for refused in (lambda: goals(file), lambda: change("add", "b", source="cli")):
        with pytest.raises(CheckpointError, match=r"made by version 0\.1\.0.*move it") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


def test_an_older_schema_is_brought_up_to_date_by_a_change(file, change, monkeypatch):
    change("add", "a", source="cli")
    more = (*module.MIGRATIONS, ("ALTER TABLE goals ADD COLUMN note TEXT", "UPDATE goals SET note = 'new'"))
    monkeypatch.setattr(module, "MIGRATIONS", more)
    with module.read(file) as sql:  # a copy in memory
        assert sql.execute("SELECT text, note FROM goals").fetchall() == [("a", "new")]
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (module.FIRST,)
    with changing(file) as store:
        assert store._sql.execute("SELECT text, note FROM goals").fetchall() == [("a", "new")]


def test_a_migration_that_fails_leaves_the_old_schema(file, change, monkeypatch):
    change("add", "a", source="cli")
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "MIGRATIONS", (*module.MIGRATIONS, ("ALTER TABLE goals ADD COLUMN note TEXT", "nonsense"))
        )
        with pytest.raises(CheckpointError):
            change("add", "b", source="cli")
    assert [goal.text for goal in goals(file)] == ["a"]


# -- a database that cannot be used --------------------------------------------------------------------------


def refused(file, change, said):
    for refused in (lambda: goals(file), lambda: change("add", "b", source="cli")):
        with pytest.raises(CheckpointError, match=said) as caught:
            refused()
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("junk", [b"this is no database, but it is long enough to be one " * 20, b"\0" * 5000])
def test_a_file_that_is_no_database(file, change, junk):
    file.parent.mkdir()
    file.write_bytes(junk)
    refused(file, change, "damaged or not a database of aios .*move it away")
    assert file.read_bytes() == junk


def test_a_malformed_database(file, change):
    change("add", "a", source="cli")
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    refused(file, change, "damaged or not a database of aios")


def test_a_database_of_something_else(file, change):
    file.parent.mkdir()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE goals (x)")
    connection.close()
    with pytest.raises(CheckpointError, match=r"not a database of aios .*already exists"):
        change("add", "a", source="cli")


def test_a_folder_in_its_place(file, change):
    file.mkdir(parents=True)
    refused(file, change, "cannot be opened")


def test_a_locked_database(file, change, monkeypatch):
    change("add", "a", source="cli")
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CheckpointError, match="held by another program"):
        change("add", "b", source="cli")
    assert [goal.text for goal in goals(file)] == ["a"]
    other.close()
    change("add", "b", source="cli")


@pytest.fixture
def connected(monkeypatch):
    """Let each connection begin with a pragma."""
    connect = module._connect

    def call(pragma):
        def connect_so(file, *, create):
            connection = connect(file, create=create)
            connection.execute(f"PRAGMA {pragma}")
            return connection

        monkeypatch.setattr(module, "_connect", connect_so)

    return call


def test_a_read_only_database(file, change, connected):
    change("add", "a", source="cli")
    connected("query_only = ON")
    with pytest.raises(CheckpointError, match="cannot be written"):
        change("add", "b", source="cli")
    assert [goal.text for goal in goals(file)] == ["a"]


def test_a_full_disk(file, change, connected):
    change("add", "a", source="cli")
    connected("max_page_count = 1")

    def fill():
        with changing(file) as store:
            for number in range(100):
                store.add(f"{number}" + "x" * 900, source="cli")
            store._sql.execute("COMMIT")

    with pytest.raises(CheckpointError, match="disk is full"):
        fill()
    assert [goal.text for goal in goals(file)] == ["a"]
