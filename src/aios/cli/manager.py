"""aios manager, also aios gui: the Subbrains Manager, a web page."""

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from chronomoe.errors import ConfigError


def manager(
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    open: Annotated[bool, Parameter(negative="--no-open")] = True,
    root: Path = Path(),
) -> None:
    """See and steer a workspace in the browser: experts, goals, training, jobs. Only this machine can reach it.

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
    root
        Workspace folder.
    """
    try:
        import nicegui  # noqa: F401
    except ImportError:
        raise ConfigError("the manager needs nicegui: pip install 'chronomoe-aios[manager]'.") from None
    from aios.manager.application import serve

    serve(root, host=host, port=port, token=token or os.environ.get("AIOS_TOKEN") or None, browser=open)
