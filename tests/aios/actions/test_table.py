"""The table of commands: each is an action, and the words of a call, read again, are that call."""

import inspect
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aios.actions import Action, data, experts, goals, talk
from aios.actions.table import COMMANDS, command_line, command_of, find, words_of
from aios.cli import _first_line, app
from aios.settings.data import PrepareConfig
from aios.settings.expert import ExpertTraining
from aios.settings.goals import GoalFlags
from aios.settings.sampling import Sampling

ACTIONS = {command: find(command) for command in COMMANDS if isinstance(find(command), Action)}


def read(words):
    """The action and the arguments that the command line makes of these words."""
    action, bound, _ = app.parse_args(list(words), exit_on_error=False, print_error=False)
    return action, dict(bound.arguments)


@pytest.mark.parametrize("command", ACTIONS)
def test_a_command_is_one_action_with_one_docstring(command):
    action = ACTIONS[command]
    assert command_of(action) == command
    assert _first_line(COMMANDS[command]) == inspect.getdoc(action).splitlines()[0] != ""
    assert "workspace" not in inspect.signature(action).parameters


TEXT = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=20)
WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
NUMBER = st.floats(1e-6, 1e6)
CALLS = st.one_of(
    st.tuples(
        st.just(experts.attach),
        st.fixed_dictionaries({"expert": WORD, "brain": WORD}, optional={"force": st.booleans()}),
    ),
    st.tuples(
        st.just(experts.create),
        st.fixed_dictionaries({"expert": WORD}, optional={"name": TEXT, "goal": st.lists(TEXT, min_size=1)}),
    ),
    st.tuples(
        st.just(experts.delete),
        st.fixed_dictionaries(
            {"expert": WORD, "yes": st.booleans()}, optional={"children": st.sampled_from(["orphan", "cascade"])}
        ),
    ),
    st.tuples(
        st.just(experts.train),
        st.fixed_dictionaries(
            {
                "expert": WORD,
                "settings": st.builds(
                    ExpertTraining,
                    brain=WORD,
                    dataset_file=WORD.map(Path),
                    steps=st.integers(1, 99),
                    lr=NUMBER,
                    default_goal=st.none() | TEXT,
                ),
            }
        ),
    ),
    st.tuples(st.just(goals.add), st.fixed_dictionaries({"text": TEXT}, optional={"weight": NUMBER})),
    st.tuples(st.just(goals.weigh), st.fixed_dictionaries({"goal_id": st.integers(0, 10**9), "weight": NUMBER})),
    st.tuples(st.just(goals.unlink), st.fixed_dictionaries({"goal_id": st.integers(0, 99)}, optional={"expert": WORD})),
    st.tuples(
        st.just(talk.generate),
        st.fixed_dictionaries(
            {"name": WORD},
            optional={
                "stream": st.booleans(),
                "prompt": TEXT,
                "sampling": st.builds(
                    Sampling, temperature=NUMBER, seed=st.integers(0, 2**63), segments=st.none() | st.integers(1, 9)
                ),
                "goals": st.builds(
                    GoalFlags,
                    goal=st.lists(TEXT, max_size=3).map(tuple),
                    goals_active=st.booleans(),
                    goal_layers=st.lists(st.integers(0, 9), max_size=3).map(tuple),
                ),
            },
        ),
    ),
    st.tuples(
        st.just(data.prepare),
        st.fixed_dictionaries(
            {"sources": st.lists(WORD, min_size=1, max_size=3).map(tuple)},
            optional={
                "config": st.builds(
                    PrepareConfig,
                    vocab_size=st.just("bytes") | st.integers(1, 9999),
                    overwrite=st.booleans(),
                    quotes=st.none() | st.booleans(),
                )
            },
        ),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CALLS)
def test_the_words_of_a_call_are_that_call(call):
    action, arguments = call
    found, again = read(words_of(action, arguments))
    assert found is action
    parameters = inspect.signature(action).parameters
    for name, value in arguments.items():
        assert again.get(name, parameters[name].default) == value, name
    assert set(again) <= set(arguments)


def test_defaults_are_left_out_and_the_workspace_is_named(tmp_path):
    call = {"expert": "laws", "brain": "small", "force": False}
    assert words_of(experts.attach, call) == ("experts", "attach", "laws", "--brain", "small")
    words = words_of(goals.add, {"text": "--weight", "weight": 0.5})
    assert words == ("goals", "add", "--weight", "0.5", "--", "--weight")
    line = f"aios goals add --weight 0.5 --root {tmp_path} -- --weight"
    assert command_line(tmp_path, goals.add, {"text": "--weight", "weight": 0.5}) == line


def test_an_action_is_called_by_the_names_of_its_arguments(tmp_path):
    done = goals.add.run(tmp_path, {"text": "Write verse", "weight": 0.5})
    assert done.sentence == "Added goal 1, linked to no expert."
    assert (done.value["text"], done.value["weight"], done.code) == ("Write verse", 0.5, 0)
    assert goals.weigh.run(tmp_path, {"goal_id": 1, "weight": 0.25}).sentence == "Goal 1 has weight 0.25."


def test_what_needs_torch_says_so(tmp_path):
    experts.create(tmp_path, "laws")
    assert experts.attach.is_heavy(tmp_path, {"expert": "laws", "brain": "small"})
    assert not experts.freeze.is_heavy(tmp_path, {"expert": "laws"})
    assert not goals.add.is_heavy(tmp_path, {"text": "x"})
