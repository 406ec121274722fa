"""The action that serves the Subbrains Manager: `aios manager`, also `aios gui`. Imports nothing of the web."""

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.actions import Done, Show, action
from chronomoe.errors import ConfigError


@action()
def manager(
    workspace: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    open: Annotated[bool, Parameter(negative="--no-open")] = True,
    show: Show = print,
) -> Done:
    """Manage a workspace in the browser; also `aios gui`.

    Experts, goals, training, routing, chat, jobs. Only this machine can reach it.

    Parameters
    ----------
    host
        Address to listen at; any but this machine's own needs --token.
    port
        Port to listen at; 0 takes any that is free.
    token
        Word that a browser must show once, as ?token=WORD; AIOS_TOKEN gives it too, unseen by other users.
    open
        Open the browser.
    """
    try:
        import nicegui  # noqa: F401
    except ImportError:
        raise ConfigError("the manager needs nicegui: pip install 'chronomoe-aios[manager]'.") from None
    from aios.manager.application import serve

    token = token or os.environ.get("AIOS_TOKEN") or None
    serve(workspace, host=host, port=port, token=token, browser=open, show=show)
    return Done()
