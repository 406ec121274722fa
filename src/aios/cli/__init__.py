"""The `aios` command. Help and completion import neither torch nor transformers.

Every command is an action of :mod:`aios.actions`, by the table there. This module reads the words, calls the action and
prints what it did: a sentence or a table, or JSON.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one sentence; --debug shows the traceback.
"""

import inspect
import io
import json as jsonlib
import os
import re
import signal
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from rich.console import Console

from aios.actions import Action, ignore, refuse, to_stderr
from aios.actions.quiet import quiet_libraries
from aios.actions.table import COMMANDS, command_of
from aios.cli.render import RENDERERS
from aios.sentence import sentence
from chronomoe import __version__
from chronomoe.errors import CheckpointError, ConfigError

GROUPS = {
    "brains": "Manage brains.",
    "data": "Manage training data.",
    "experts": "Manage experts.",
    "goals": "Manage goals. Each command has a second spelling: `aios goals-add` is `aios goals add`.",
    "hrm-hf": "Train hierarchical reasoning models.",
}
EVERY_COMMAND = {**COMMANDS, "manager": "aios.manager.command:manager"}
"""The pages call actions by the table; what serves the pages is above them."""
ALIASES = {"manager": "gui"}
"""Second names, shown in the help."""


@dataclass(frozen=True)
class Line:
    """A command line without what concerns every command."""

    words: tuple[str, ...]
    root: Path | None
    json: bool
    debug: bool


app = cyclopts.App(
    name="aios",
    help="Train, steer and grow small Mixture-of-Experts language models.",
    help_epilogue="Add --debug to any command for the traceback of an error.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    help_format="plaintext",  # of lists of commands; importing what reads markdown takes a third of their time
)


@app.meta.default
def read_line(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    root: Annotated[Path | None, Parameter(help="Workspace folder. [.]")] = None,
    json: Annotated[bool, Parameter(help="Print JSON, for programs.", negative="", show_default=False)] = False,
    debug: Annotated[bool, Parameter(show=False, negative="")] = False,
) -> Line:
    """Take what concerns every command from the words of a command line."""
    return Line(words, root, json, debug or os.environ.get("AIOS_DEBUG") == "1")


def _add_commands() -> None:
    groups = {}
    for command, place in sorted(EVERY_COMMAND.items()):
        group, _, name = command.rpartition(" ")
        if group and group not in groups:
            groups[group] = cyclopts.App(name=group, help=GROUPS[group])
            app.command(groups[group])
        within = groups.get(group, app)
        within.command(place, name=name, alias=ALIASES.get(command), help=_first_line(place))
        if group == "goals":  # as the founding text spells them
            app.command(place, name=f"goals-{name}", show=False)


def _first_line(place: str) -> str:
    """The first line of an action's docstring, read without importing its module."""
    module, _, name = place.partition(":")
    found = re.search(rf'^def {name}\(.*?^    """(.+?)(?:"""|\n)', _source(module), re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


@lru_cache
def _source(module: str) -> str:
    return Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


_add_commands()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; training takes both over while it runs
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(words: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    app.config = ()
    line = None
    try:
        first, rest = _split(words)
        for called in app.parse_commands(rest)[1]:
            if isinstance(called.default_command, Action):
                called.help, called.help_format = None, "markdown"  # the whole docstring, in paragraphs
        line = app.meta([*first, *rest], exit_on_error=False, print_error=True, result_action="return_value")
        return _run(line) if isinstance(line, Line) else 0  # 0: it was help, or the version
    except cyclopts.CycloptsError:
        return 2
    except KeyboardInterrupt:
        _complain("interrupted; what was saved before is untouched.")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if line is not None and line.debug:
            raise
        _complain(sentence(error))
        return 2 if isinstance(error, ConfigError) else 1


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What concerns every command, and the rest. It goes first: a text that may begin with - does not take it then."""
    end = words.index("--") if "--" in words else len(words)  # what follows is text
    first: list[str] = []
    rest: list[str] = []
    before = list(words[:end])
    while before:
        word = before.pop(0)
        if word in ("--json", "--debug") or word.startswith("--root="):
            first.append(word)
        elif word == "--root" and before:
            first += [word, before.pop(0)]
        else:
            rest.append(word)
    return first, [*rest, *words[end:]]


def _run(line: Line) -> int:
    words = list(line.words)
    _read_config_file(words)
    command, bound, hooks = app.parse_args(words, exit_on_error=False, print_error=True)
    if isinstance(command, Action):
        return _act(command, bound, hooks, line)
    if inspect.ismethod(command):  # a group without a command: its help
        app.meta([*words, "--help"], exit_on_error=False, print_error=True, result_action="return_value")
        return 0
    quiet_libraries()
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def _act(action: Action[...], bound: Any, hooks: Any, line: Line) -> int:
    wants_json = line.json or (action.failure is not None and not sys.stdout.isatty())
    faces = {
        "show": to_stderr if wants_json else print,
        "note": to_stderr,
        "write": ignore if wants_json else _write,
        "ask": input,
        "confirm": _confirm,
    }
    quiet_libraries()
    try:
        done = action.function(
            line.root or action.workspace,
            *bound.args,
            **bound.kwargs,
            **{name: faces[name] for name in faces.keys() & hooks.keys()},
        )
    except (CheckpointError, OSError) as error:
        if action.failure is not None and wants_json and not isinstance(error, BrokenPipeError):
            _print_json({"success": False} | action.failure(**bound.arguments) | {"error": sentence(error)})
        raise
    if wants_json:
        if done.value is not None:
            _print_json(done.value)
    else:
        if done.sentence:
            print(done.sentence)
        if done.value and (render := RENDERERS.get(command_of(action))) is not None:
            render(done.value)
    return done.code


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _confirm(question: str) -> bool:
    """Put a question at the terminal; :class:`ConfigError` where there is none."""
    if not sys.stdin.isatty():
        return refuse(question)
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _print_json(value: Any) -> None:
    print(jsonlib.dumps(value, indent=2))


def _complain(words: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"aios: {words}")


def _read_config_file(words: Sequence[str]) -> None:
    """Let the keys of --config FILE stand in for flags that are not given."""
    for position, word in enumerate(words):
        name, _, path = word.partition("=")
        if name == "--config":
            path = path or (words[position + 1] if position + 1 < len(words) else "")
            if not os.path.isfile(path):
                raise ConfigError(f"there is no config file {path or '(none given)'}.")
            try:
                values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} is not valid TOML: {error}.") from error
            # Below its command, for cyclopts takes a key at the top that is a command's name (data) for that command.
            for command in reversed(app.parse_commands(words)[0]):
                values = {command: values}
            app.config = (cyclopts.config.Dict(values, source=path),)
