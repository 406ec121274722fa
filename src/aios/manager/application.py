"""The web application, and serving it: `aios manager`."""

import contextlib
import logging
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import uvicorn
from fastapi import FastAPI
from nicegui import app as pages
from nicegui import ui

from aios.manager import chat_page, experts_page, goals_page, jobs_page, routing_page, run_form, training_page
from aios.manager.frame import Site
from aios.manager.guard import LARGEST, Guard, is_loopback
from chronomoe.errors import ConfigError


def build(root: Path, *, host: str = "127.0.0.1", token: str | None = None) -> Guard:
    """The application for one workspace, guarded. A process has one."""
    site = Site(root)
    for page in (experts_page, goals_page, training_page, run_form, routing_page, chat_page, jobs_page):
        page.add_to(site)
    pages.on_shutdown(site.worker.end)
    web = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        web,
        title="Subbrains Manager",
        language="en-US",
        favicon="🧠",
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=10,
    )
    return Guard(web, host=host, token=token)


def serve(
    root: Path,
    *,
    host: str,
    port: int,
    token: str | None,
    browser: bool,
    show: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted; :class:`ConfigError` for a host without a token, or an address one cannot have."""
    if not is_loopback(host) and not token:
        raise ConfigError(f"with --host {host} others can reach the page; give a --token that they must know.")
    if not root.is_dir():
        raise ConfigError(f"there is no folder {root}; `aios init` prepares a workspace.")
    with contextlib.closing(_bound(host, port)) as place:
        application = build(root, host=host, token=token)
        name = f"[{host}]" if ":" in host else {"0.0.0.0": socket.gethostname()}.get(host, host)
        address = f"http://{name}:{place.getsockname()[1]}/"
        show(f"Subbrains Manager: {address}{'?token=...' if token else ''} (Ctrl-C ends it; jobs go on)")
        if browser:
            start = f"{address}?{urlencode({'token': token})}" if token else address
            pages.on_startup(lambda: webbrowser.open(start))
        logging.getLogger("nicegui").setLevel(logging.ERROR)
        config = uvicorn.Config(
            application,
            log_level="error",
            lifespan="on",
            ws_max_size=LARGEST,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[place])


def _bound(host: str, port: int) -> socket.socket:
    """A socket at this address, before anything else is made."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except (OSError, OverflowError) as error:
        place.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{host}:{port} cannot be had ({reason}); choose another with --port.") from error
    return place
