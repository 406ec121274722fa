"""Settings: what is checked and in which words, layers, and files with a version."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe.errors import CheckpointError, ConfigError, DataError
from chronomoe.settings import TRANSIENT, Bounds, FileFormat, Settings, bounds_of


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    rate: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Example(Settings):
    file_format: ClassVar = FileFormat(name="example", version=2, outdated="make it again")

    steps: Annotated[int, Bounds(ge=1, lt=10_000)] = 100
    scale: Annotated[float | None, Bounds(gt=0)] = None
    schedule: Literal["cosine", "linear"] = "cosine"
    text: str = "a"
    on: bool = False
    folder: Path | None = None
    layers: tuple[int, ...] = ()
    pairs: tuple[tuple[float, str], ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    inner: Inner = Inner()
    anything: Any = None
    dry_run: Annotated[bool, TRANSIENT] = False


numbers = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, rate=st.floats(0, 1), names=st.lists(st.text(), max_size=3).map(tuple))
values = {
    "steps": st.integers(1, 9_999),
    "scale": st.none() | st.floats(min_value=1e-9, max_value=1e9),
    "schedule": st.sampled_from(["cosine", "linear"]),
    "text": st.text(),
    "on": st.booleans(),
    "folder": st.none() | st.text("abc/", min_size=1).map(Path),
    "layers": st.lists(st.integers(), max_size=3).map(tuple),
    "pairs": st.lists(st.tuples(numbers, st.text()), max_size=3).map(tuple),
    "counts": st.dictionaries(st.text(), st.integers(), max_size=3),
    "inner": inners,
    "dry_run": st.booleans(),
}
examples = st.fixed_dictionaries({}, optional=values).map(lambda chosen: Example(**chosen))
WRONG = {
    "steps": [0, 10_000, 1.5, True, "3", None],
    "scale": [0, float("nan"), float("inf"), "1", False],
    "schedule": ["step", 1, None],
    "text": [1, None, Path("a")],
    "on": [0, "yes", None],
    "folder": ["a", 3],
    "layers": [(1.5,), [1], (True,), "12"],
    "pairs": [((1.0,),), ((1.0, 2),), (1.0, "a")],
    "counts": [{"a": "b"}, {1: 1}, ()],
    "inner": [None, {}, 3],
    "dry_run": ["no"],
}


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    size: Annotated[int, Bounds(ge=1)] = 1
    free: int = 0
    real: float = 0.0
    share: Annotated[float, Bounds(ge=0, le=1)] = 0.0
    positive: Annotated[float | None, Bounds(gt=0)] = None
    small: Annotated[int, Bounds(lt=1000)] = 0
    on: bool = False
    word: str | None = None
    pick: Literal["a", "b"] | None = None
    many: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("size", 0, "size is 0; it must be a whole number, at least 1."),
        ("size", 1.5, "size is 1.5; it must be a whole number, at least 1."),
        ("free", True, "free is True; it must be a whole number."),
        ("real", "2", "real is '2'; it must be a finite number."),
        ("real", None, "real is None; it must be a finite number."),
        ("share", float("nan"), "share is nan; it must be a finite number, at least 0 and at most 1."),
        ("positive", float("inf"), "positive is inf; it must be a finite number, above 0, or None."),
        ("positive", 0, "positive is 0; it must be a finite number, above 0, or None."),
        ("small", 1000, "small is 1000; it must be a whole number, below 1,000."),
        ("on", 1, "on is 1; it must be true or false."),
        ("word", 1, "word is 1; it must be text, or None."),
        ("pick", "c", "pick is 'c'; use one of a, b."),
        ("many", (1, "x"), "many is (1, 'x'); it must be a list of the right values."),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(name, value, sentence):
    with pytest.raises(ConfigError) as refused:
        Sizes(**{name: value})
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, wrong in WRONG.items() for value in wrong])
def test_every_kind_of_field_is_checked(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is "):
        Example(**{name: value})


def test_a_long_value_is_not_repeated_in_full():
    with pytest.raises(ConfigError) as refused:
        Sizes(word=tuple(range(1000)))
    assert len(str(refused.value)) < 160


@settings(max_examples=40, deadline=None)
@given(examples)
def test_a_file_gives_back_what_was_written(tmp_path_factory, example):
    file = tmp_path_factory.mktemp("settings") / "example.json"
    example.write_file(file)
    assert Example.read_file(file) == Example.read_file(file, exact=True) == example.replace(dry_run=False)
    assert "dry_run" not in json.loads(file.read_text())


@settings(max_examples=40, deadline=None)
@given(examples, st.sampled_from(sorted(WRONG)), st.data())
def test_a_damaged_file_names_the_wrong_key(tmp_path_factory, example, name, data):
    file = tmp_path_factory.mktemp("settings") / "example.json"
    content = {"format": "example", "version": 2, **example.to_json()}
    content[name] = data.draw(st.sampled_from([{"a": None}, [None], -1.5]))
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"example\.json is damaged \(.*{name}.*\); put a copy back\.$"):
        Example.read_file(file)


@settings(max_examples=40, deadline=None)
@given(examples, examples, examples)
def test_layers_take_what_was_given_and_are_associative(top, middle, bottom):
    made = top.over(middle).over(bottom)
    assert made == top.over(middle.over(bottom))
    assert made.given == top.over(middle.over(bottom)).given
    for name in values.keys() - {"inner", "dry_run"}:
        source = next((layer for layer in (top, middle) if name in layer.given), bottom)
        assert getattr(made, name) == getattr(source, name)
    assert made.dry_run == top.dry_run
    assert "dry_run" not in made.given - top.given


@settings(max_examples=40, deadline=None)
@given(examples)
def test_a_layer_over_itself_changes_nothing(example):
    assert example.over(example) == example
    assert example.over(example).given == example.given
    assert example.changes_from(example) == {}


def test_nested_settings_are_layered_by_field():
    top, below = Example(inner=Inner(rate=0.1)), Example(inner=Inner(names=("a",), rate=0.9), steps=7)
    made = top.over(below)
    assert made == Example(inner=Inner(rate=0.1, names=("a",)), steps=7)
    assert made.changes_from(below) == {"rate": (0.9, 0.1)}


def test_a_value_given_at_its_default_counts():
    assert Example(steps=100).over(Example(steps=7)).steps == 100
    assert Example().over(Example(steps=7)).steps == 7
    assert Example().replace(steps=100).given == {"steps"}


@dataclass(frozen=True, kw_only=True)
class Wider(Example):
    steps: Annotated[int, Bounds(ge=1)] = 5
    more: int = 0


def test_a_subclass_takes_the_settings_of_its_base():
    made = Wider(more=3).over(Example(steps=20_000 // 3))
    assert (type(made), made.steps, made.more) == (Wider, 6666, 3)
    assert bounds_of(Example, "steps") == Bounds(ge=1, lt=10_000)
    assert bounds_of(Wider, "steps") == Bounds(ge=1)
    assert bounds_of(Wider, "text") == Bounds()


@settings(max_examples=40, deadline=None)
@given(examples)
def test_copies_remember_what_was_given(example):
    for twin in (copy.deepcopy(example), pickle.loads(pickle.dumps(example))):
        assert twin == example
        assert twin.given == example.given
    assert set(asdict(example)) == {one.name for one in fields(example)}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged ("),
        ("[]", "is damaged (it is no object with named values); put a copy back."),
        ("[" * 100_000, "is damaged ("),
        ('{"format": "other", "version": 2}', "is not a file of the format example; put a copy back."),
        ('{"format": "example", "version": "2"}', "is not a file of the format example"),
        (
            '{"format": "example", "version": 1}',
            "was made by version 0.1.0, which wrote it differently; make it again.",
        ),
        ('{"steps": 3}', "was made by version 0.1.0, which wrote it differently; make it again."),
        ('{"format": "example", "version": 3}', "was made by a newer version than this one; update chronomoe-aios."),
        ('{"format": "example", "version": 2, "step": 1}', "is damaged (there is no setting 'step'); put a copy back."),
        ('{"format": "example", "version": 2, "inner": {"rate": 7}}', "(inner: rate is 7; it must be a finite"),
        ('{"format": "example", "version": 2, "dry_run": true}', "there is no setting 'dry_run'"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_one_sentence(tmp_path, content, sentence):
    file = tmp_path / "example.json"
    file.write_text(content)
    with pytest.raises(CheckpointError) as refused:
        Example.read_file(file)
    assert sentence in str(refused.value)


@dataclass(frozen=True, kw_only=True)
class Strict(Settings):
    file_format: ClassVar = FileFormat(name="strict", version=1, outdated="x", remedy="prepare again", error=DataError)

    needed: int
    usual: int = 2


def test_missing_fields_and_the_error_of_the_format(tmp_path):
    assert Strict.from_json({"needed": 1}).given == {"needed"}
    with pytest.raises(ConfigError, match=r"^data: needed is missing\.$"):
        Strict.from_json({"usual": 1}, "data")
    file = tmp_path / "strict.json"
    file.write_text('{"format": "strict", "version": 1, "needed": 1}')
    assert Strict.read_file(file) == Strict(needed=1)
    with pytest.raises(DataError, match=r"is damaged \(usual is missing\); prepare again\."):
        Strict.read_file(file, exact=True)
    with pytest.raises(FileNotFoundError):
        Strict.read_file(tmp_path / "nowhere")


def test_importing_it_is_cheap():
    code = "import sys; import chronomoe.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
