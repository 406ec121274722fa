"""The action that serves the Subbrains Manager: `aios manager`, also `aios gui`. Imports nothing of the web."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    if importlib.util.find_spec("nicegui") is None:
        raise ConfigError("the manager needs nicegui: pip install 'chronomoe-aios[manager]'.")
    with _fast_imports():
        from aios.manager.application import serve

    token = token or os.environ.get("AIOS_TOKEN") or None
    serve(workspace, host=host, port=port, token=token, browser=open, show=show)
    return Done()


@contextmanager
def _fast_imports() -> Iterator[None]:
    """Import the web libraries a quarter faster, and so show the first page that much sooner.

    No garbage is collected meanwhile: importing makes hardly any, and each collection walks all that was imported. And
    python-socketio does without aiohttp, of which its client alone has use.
    """
    gc.disable()
    without = "aiohttp" not in sys.modules
    if without:
        sys.modules["aiohttp"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if without:
            del sys.modules["aiohttp"]
        gc.freeze()
        gc.enable()
