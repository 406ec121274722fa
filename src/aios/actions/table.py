"""The table of commands, and the words of a command line that an action and its arguments come to."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cyclopts
from cyclopts.argument import Argument

from aios.actions import Action
from aios.workspace import Workspace

COMMANDS = {
    "brains list": "aios.actions.brains:list_brains",
    "brains show": "aios.actions.brains:show",
    "brains rename": "aios.actions.brains:rename",
    "brains delete": "aios.actions.brains:delete",
    "brains export-hf": "aios.actions.brains:export",
    "brains upcycle": "aios.actions.brains:upcycle",
    "chat": "aios.actions.talk:chat",
    "data prepare": "aios.actions.data:prepare",
    "data tokenizer": "aios.actions.data:tokenizer",
    "demo": "aios.actions.workspace:demo",
    "doctor": "aios.actions.workspace:doctor",
    "evaluate": "aios.actions.measure:evaluate",
    "experts list": "aios.actions.experts:list_experts",
    "experts show": "aios.actions.experts:show",
    "experts create": "aios.actions.experts:create",
    "experts train": "aios.actions.experts:train",
    "experts attach": "aios.actions.experts:attach",
    "experts detach": "aios.actions.experts:detach",
    "experts gate": "aios.actions.experts:gate",
    "experts export": "aios.actions.experts:export",
    "experts import": "aios.actions.experts:import_expert",
    "experts import-registry": "aios.actions.experts:import_registry",
    "experts freeze": "aios.actions.experts:freeze",
    "experts unfreeze": "aios.actions.experts:unfreeze",
    "experts activate": "aios.actions.experts:activate",
    "experts deactivate": "aios.actions.experts:deactivate",
    "experts set-parent": "aios.actions.experts:set_parent",
    "experts clear-parent": "aios.actions.experts:clear_parent",
    "experts rename": "aios.actions.experts:rename",
    "experts delete": "aios.actions.experts:delete",
    "experts stats": "aios.actions.experts:stats",
    "generate": "aios.actions.talk:generate",
    "goals add": "aios.actions.goals:add",
    "goals list": "aios.actions.goals:list_goals",
    "goals list-for-expert": "aios.actions.goals:list_for_expert",
    "goals get-expert": "aios.actions.goals:get_expert",
    "goals link-expert": "aios.actions.goals:link",
    "goals unlink-expert": "aios.actions.goals:unlink",
    "goals weigh": "aios.actions.goals:weigh",
    "goals activate": "aios.actions.goals:activate",
    "goals deactivate": "aios.actions.goals:deactivate",
    "goals remove": "aios.actions.goals:remove",
    "goals remove-like": "aios.actions.goals:remove_like",
    "goals explain": "aios.actions.goals:explain",
    "goals teach": "aios.actions.goals:teach",
    "hrm-hf arch-summary": "aios.actions.train:arch_summary",
    "hrm-hf train-actv1": "aios.actions.train:train_actv1",
    "init": "aios.actions.workspace:init",
    "plot": "aios.actions.measure:plot",
    "train": "aios.actions.train:train",
}
"""Every command but `manager`, and its action."""


def find(command: str) -> Any:
    """The action of a command of the table; imports its module."""
    module, _, name = COMMANDS[command].partition(":")
    return getattr(importlib.import_module(module), name)


def command_of(action: Action[...]) -> str:
    """The command of an action: what :func:`find` takes."""
    place = f"{action.__module__}:{action.__name__}"
    return next(command for command, found in COMMANDS.items() if found == place)


def words_of(action: Action[...], arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of the command line that calls ``action`` with these arguments; defaults are left out.

    Positional arguments come last, after ``--``, where one could be taken for a flag.
    """
    app = cyclopts.App()
    app.default(action)
    positional: list[str] = []
    flags: list[str] = []
    for argument in app.assemble_argument_collection():
        name, default = argument.field_info.name, argument.field_info.default
        if argument.keys or not argument.parse or name not in arguments:
            continue  # the fields of a settings class come with the class
        value = arguments[name]
        if argument.children:
            for field in argument.children_recursive:
                flags += _flag(field, _at(value, field.keys), _at(default, field.keys))
        elif argument.index is None:
            flags += _flag(argument, value, default)
        elif value is not None:
            positional += map(str, value if argument.is_var_positional() else [value])
    hidden = any(word.startswith("-") for word in positional)
    after = ["--", *positional] if hidden else []
    return (*command_of(action).split(), *([] if hidden else positional), *flags, *after)


def command_line(workspace: Path, action: Action[...], arguments: Mapping[str, Any]) -> str:
    """The ``aios`` command that calls an action in a workspace, ready to paste."""
    return Workspace(workspace).command(*words_of(action, arguments))


def _at(settings: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        settings = getattr(settings, key)
    return settings


def _flag(argument: Argument, value: Any, default: Any) -> list[str]:
    empty = not value and not isinstance(value, bool)
    if value is None or value == default or (empty and default is None and argument.negatives):
        return []
    flag = next(name for name in argument.names if name not in argument.negatives)
    if isinstance(value, bool):
        return [flag if value else argument.negatives[0]]
    if isinstance(value, list | tuple):
        return [word for one in value for word in _pair(flag, one)] or [argument.negatives[0]]
    return _pair(flag, value)


def _pair(flag: str, value: Any) -> list[str]:
    word = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]
