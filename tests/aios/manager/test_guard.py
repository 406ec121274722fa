"""Whose requests are answered."""

import asyncio

import pytest

from aios.manager.guard import LARGEST, Guard, is_loopback


class Inner:
    """Notes that it was reached."""

    def __init__(self):
        self.reached = 0

    async def __call__(self, scope, receive, send):
        self.reached += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


def ask(guard, kind="http", method="GET", path="/", query="", **headers):
    """Status (403 for a websocket that was closed before it opened), and all messages."""
    scope = {
        "type": kind,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "server": ("127.0.0.1", 8765),
    }
    if kind == "http":
        scope["method"] = method
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, None, send))
    return sent[0].get("status", 403), sent


OURS = "127.0.0.1:8765"


@pytest.fixture
def guard():
    return Guard(Inner())


@pytest.mark.parametrize("host", [OURS, "localhost:8765", "localhost", "[::1]:8765", "LOCALHOST:1"])
def test_our_own_names_are_answered(guard, host):
    assert ask(guard, host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "192.168.0.7:8765", "[::1", "localhost.evil"],
)
def test_another_name_is_refused_so_that_no_name_can_be_rebound_to_us(guard, host):
    assert ask(guard, host=host)[0] == 403
    assert ask(guard, "websocket", host=host, origin=f"http://{host}")[0] == 403
    assert not guard.app.reached


def test_a_request_without_host_or_with_two_is_refused(guard):
    assert ask(guard)[0] == 403
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", OURS.encode())] * 2}
    assert guard.refusal(scope)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8765"])
def test_another_sites_page_is_refused(guard, origin):
    for method in ("GET", "POST", "DELETE"):
        assert ask(guard, method=method, host=OURS, origin=origin, content_length="2")[0] == 403
    status, sent = ask(guard, "websocket", host=OURS, origin=origin)
    assert (status, sent[0]["type"]) == (403, "websocket.close")
    assert not guard.app.reached


def test_what_writes_must_say_where_it_comes_from(guard):
    assert ask(guard, method="POST", host=OURS, content_length="2")[0] == 403
    assert ask(guard, "websocket", host=OURS)[0] == 403
    assert ask(guard, method="POST", host=OURS, origin=f"http://{OURS}", content_length="2")[0] == 200
    assert ask(guard, "websocket", host=OURS, origin=f"http://{OURS}")[0] == 200


def test_large_bodies_are_refused_before_they_are_read(guard):
    ours = {"host": OURS, "origin": f"http://{OURS}"}
    assert ask(guard, method="POST", **ours, content_length=str(LARGEST + 1))[0] == 413
    assert ask(guard, method="POST", **ours)[0] == 411
    assert ask(guard, method="POST", **ours, content_length="x")[0] == 411


def test_every_answer_forbids_frames_and_other_machines(guard):
    for status, sent in (ask(guard, host=OURS), ask(guard, host="evil.example")):
        headers = dict(sent[0]["headers"])
        assert status in (200, 403)
        assert headers[b"x-frame-options"] == b"DENY"
        assert b"connect-src 'self'" in headers[b"content-security-policy"]


def test_with_a_token_only_who_has_it_comes_in():
    guard = Guard(Inner(), host="0.0.0.0", token="a word & more")
    assert ask(guard, host="192.168.0.7:8765")[0] == 401
    assert ask(guard, host="192.168.0.7:8765", query="token=wrong")[0] == 401
    assert ask(guard, "websocket", host="192.168.0.7:8765", origin="http://192.168.0.7:8765")[0] == 403
    status, sent = ask(guard, host="192.168.0.7:8765", path="//evil.example", query="token=a+word+%26+more&run=x")
    headers = dict(sent[0]["headers"])
    assert status == 303
    assert headers[b"location"] == b"/evil.example?run=x"  # never to another machine, never with the token
    assert b"a word" not in headers[b"set-cookie"]
    cookie = headers[b"set-cookie"].decode().partition(";")[0]
    assert ask(guard, host="192.168.0.7:8765", cookie=cookie)[0] == 200
    opened = ask(guard, "websocket", host="192.168.0.7:8765", origin="http://192.168.0.7:8765", cookie=cookie)
    assert opened[0] == 200
    assert ask(guard, host="evil.example", cookie=cookie)[0] == 403


def test_a_named_host_is_known_by_its_name_and_no_other():
    guard = Guard(Inner(), host="10.0.0.5", token="t")
    assert ask(guard, host="10.0.0.5:8765", query="token=t")[0] == 303
    assert ask(guard, host="10.0.0.6:8765", query="token=t")[0] == 403


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.7", "example.org", "")))


def test_a_token_is_whole_as_written_and_kept_out_of_reach():
    guard = Guard(Inner(), host="0.0.0.0", token="Word")
    there = {"host": "192.168.0.7:8765"}
    _, sent = ask(guard, **there, path="/a b\r\nx: y", query="token=Word")
    headers = dict(sent[0]["headers"])
    assert headers[b"location"] == b"/a%20b%0D%0Ax%3A%20y"
    name, _, rest = headers[b"set-cookie"].decode().partition("=")
    assert {" HttpOnly", " SameSite=Strict"} <= set(rest.split(";"))
    secret = rest.partition(";")[0]
    for part in ("", secret[:1], secret[:-1], secret + "0"):
        assert ask(guard, **there, cookie=f"{name}={part}")[0] == 401
    assert ask(guard, **there, method="HEAD")[0] == 401
    assert ask(guard, **there, query="token=word")[0] == 401
    # Who is in stays in, whatever a link says.
    status, sent = ask(guard, **there, cookie=f"{name}={secret}", query="token=wrong")
    assert status == 200
    assert not [key for key, _ in sent[0]["headers"] if key == b"set-cookie"]


def test_a_host_is_known_however_it_is_spelled():
    assert ask(Guard(Inner(), host="MyServer.Lan", token="t"), host="myserver.lan:1", query="token=t")[0] == 303
    assert ask(Guard(Inner(), host="fd00:0:0:0::1", token="t"), host="[fd00::1]:1", query="token=t")[0] == 303


def test_the_policy_lets_nothing_come_from_elsewhere(guard):
    headers = dict(ask(guard, host=OURS)[1][0]["headers"])
    policy = dict(part.strip().partition(" ")[::2] for part in headers[b"content-security-policy"].decode().split(";"))
    assert "'self'" in policy["default-src"]
    assert not [value for value in policy.values() if "*" in value or "http" in value]
