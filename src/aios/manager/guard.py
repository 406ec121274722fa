"""Who may talk to the page: this machine's own browser, or one that has the token; never another site's page.

A page of another site can make a browser send requests here. It cannot choose their Host (unless its name is rebound
to this address: then Host is its own name) nor their Origin, and those are what is checked, for websockets too.
"""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST = 1_000_000
"""Bytes of a request's body, and of one message on the websocket."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = [
    # Vue compiles templates in the browser, hence unsafe-eval; nothing may be fetched from or sent to another machine.
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; form-action 'self'; "
        b"base-uri 'self'; object-src 'none'; frame-ancestors 'none'",
    ),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def is_loopback(host: str) -> bool:
    """Does only this machine reach what is bound to ``host``?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _plain(host: str) -> str:
    """As a browser spells it."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()


class Guard:
    """ASGI application that lets only permitted requests through to ``app``."""

    def __init__(self, app: App, *, host: str = "127.0.0.1", token: str | None = None) -> None:
        self.app, self.host = app, _plain(host)
        self.secret = None if token is None else hashlib.sha256(token.encode()).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return
        given = _token_in(scope)
        if self._is_secret(given) and scope["type"] == "http":
            await self._remember(scope, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, marked)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason if this request is not to be answered."""
        hosts, origins = _header(scope, b"host"), _header(scope, b"origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 403, "This page is not known under that name."
        same = [origin for origin in origins if origin in (f"http://{hosts[0]}", f"https://{hosts[0]}")]
        if len(same) != len(origins) or len(origins) > 1:
            return 403, "Another site's page may not use this one."
        writes = scope["type"] == "websocket" or scope.get("method") not in ("GET", "HEAD")
        if writes and not same:
            return 403, "A request that changes something must say where it comes from (Origin)."
        if scope["type"] == "http" and writes:
            lengths = _header(scope, b"content-length")
            if len(lengths) != 1 or not lengths[0].isdigit():
                return 411, "A request must say its length."
            if int(lengths[0]) > LARGEST:
                return 413, f"That is more than {LARGEST:,} bytes."
        if self.secret is not None and not self._has_token(scope):
            return 401, "Open the address with ?token=... as `aios manager` was given it."
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in _LOOPBACK or name == self.host:
            return True
        if self.host not in ("0.0.0.0", "::"):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (socket.gethostname().lower(), socket.getfqdn().lower())
        return True  # an address cannot be rebound

    def _is_secret(self, given: str | None) -> bool:
        return given is not None and self._matches(hashlib.sha256(given.encode()).hexdigest())

    def _matches(self, digest: str) -> bool:
        return self.secret is not None and hmac.compare_digest(digest.encode(), self.secret.encode())

    def _has_token(self, scope: Scope) -> bool:
        offered = []
        for line in _header(scope, b"cookie"):
            try:
                cookie = SimpleCookie(line).get(_cookie_name(scope))
            except CookieError:
                continue
            offered += [] if cookie is None else [cookie.value]
        return self._is_secret(_token_in(scope)) or any(map(self._matches, offered))

    async def _remember(self, scope: Scope, send: Send) -> None:
        """Put the token into a cookie and the address back to what it is without it."""
        rest = [(name, value) for name, value in parse_qsl(_query(scope)) if name != "token"]
        # A path of two slashes would lead to another machine.
        place = "/" + quote(scope["path"].lstrip("/\\")) + (f"?{urlencode(rest)}" if rest else "")
        cookie = f"{_cookie_name(scope)}={self.secret}; HttpOnly; SameSite=Strict; Path=/"
        head = [(b"location", place.encode("ascii", "replace")), (b"set-cookie", cookie.encode()), *_HEADERS]
        await send({"type": "http.response.start", "status": 303, "headers": head})
        await send({"type": "http.response.body", "body": b""})


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4403, "reason": reason})
        return
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").lower() if name != b"cookie" else value.decode("latin-1")
            for key, value in scope["headers"] if key.lower() == name]  # fmt: skip


def _query(scope: Scope) -> str:
    return str(scope.get("query_string", b"").decode("latin-1"))


def _token_in(scope: Scope) -> str | None:
    return dict(parse_qsl(_query(scope))).get("token")


def _cookie_name(scope: Scope) -> str:
    # Cookies are common to all ports of a machine.
    return f"aios_token_{(scope.get('server') or ('', 0))[1]}"
