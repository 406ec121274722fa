"""What can be done in a workspace: one function per command, called by the command line and by the pages.

An action takes the workspace folder first and returns :class:`Done`. Its docstring is the help of its command, its
signature the command's arguments: what is positional there is an argument, what is keyword-only a flag. Modules of
actions import nothing heavy; what needs torch is imported within a function.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, Generic, ParamSpec

from cyclopts import Parameter

from aios.actions.standard_input import read_text
from chronomoe.errors import ConfigError

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Done:
    """What an action did."""

    sentence: str = ""
    """For people; empty where ``value`` is shown as a table."""
    value: Any = None
    """For programs, as JSON; None when nothing was done."""
    code: int = 0
    """Exit code of the command; 130 for what was interrupted."""


class Action(Generic[Arguments]):
    """A function ``(workspace, ...) -> Done``; its signature, as a command line sees it, is without the workspace."""

    __name__: str
    __module__: str

    def __init__(
        self,
        function: Callable[Concatenate[Path, Arguments], Done],
        *,
        heavy: bool | Callable[..., bool],
        failure: Callable[..., dict[str, Any]] | None,
        workspace: Path,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        """What it does; takes the workspace first."""
        self._heavy = heavy
        self.failure = failure
        """What a program reads of a call that failed; an action that has it prints JSON whenever it is piped."""
        self.workspace = workspace
        """The folder to work in when none is named."""
        signature = inspect.signature(function)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, workspace: Path, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Done:
        return self.function(workspace, *args, **kwargs)

    def run(self, workspace: Path, arguments: dict[str, Any]) -> Done:
        """Call it with all arguments by name, the positional ones too."""
        positional, named = [], dict(arguments)
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is parameter.POSITIONAL_ONLY and parameter.name in named:
                positional.append(named.pop(parameter.name))
            elif parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(named.pop(parameter.name, ()))
        function: Callable[..., Done] = self.function
        return function(workspace, *positional, **named)

    def is_heavy(self, workspace: Path, arguments: dict[str, Any]) -> bool:
        """Does this call need torch?"""
        return self._heavy if isinstance(self._heavy, bool) else self._heavy(workspace, **arguments)


def action(
    *,
    heavy: bool | Callable[..., bool] = False,
    failure: Callable[..., dict[str, Any]] | None = None,
    workspace: Path = Path(),
) -> Callable[[Callable[Concatenate[Path, Arguments], Done]], Action[Arguments]]:
    """Make an action of a function.

    ``heavy``: it needs torch, always or where this function of the same arguments says so. ``failure`` and
    ``workspace``: see :class:`Action`.
    """
    return lambda function: Action(function, heavy=heavy, failure=failure, workspace=workspace)


def refuse(question: str) -> bool:
    """Raise :class:`ConfigError`: nobody is there to say yes."""
    raise ConfigError("deleting cannot be undone; add --yes to mean it.")


def refuse_to_ask(prompt: str) -> str:
    """Raise :class:`EOFError`: nobody is there to answer."""
    raise EOFError


def ignore(text: str) -> None:
    """Do nothing with it."""


def to_stderr(line: str) -> None:
    """Print it to standard error."""
    print(line, file=sys.stderr)


def _read_text(kind: Any, tokens: Any) -> str:
    return read_text(str(tokens[0].value))


Expert = Annotated[str, Parameter(help="Id of the expert.")]
BrainName = Annotated[str, Parameter(help="The brain: its name, family/name or path.")]
Text = Annotated[
    str,
    Parameter(converter=_read_text, allow_leading_hyphen=True, help="The text; - reads it from standard input."),
]
Flat = Parameter(name="*")
"""The fields of a settings class as flags of their own."""
Show = Annotated[Callable[[str], None], Parameter(parse=False)]
"""Gets a line of progress."""
Note = Annotated[Callable[[str], None], Parameter(parse=False)]
"""Gets a line that is no part of the result; the command line writes it to standard error."""
Write = Annotated[Callable[[str], None], Parameter(parse=False)]
"""Gets text piece by piece, as it is made."""
Confirm = Annotated[Callable[[str], bool], Parameter(parse=False)]
"""Puts a question that is answered yes or no."""
Ask = Annotated[Callable[[str], str], Parameter(parse=False)]
"""Waits for a line; raises EOFError at the end."""
