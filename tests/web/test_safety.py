"""What other sites, odd requests and the network can do: nothing."""

import http.client
import socket
import time
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from aios.store.entry import ExpertEntry
from aios.store.goals import Goals
from aios.store.transaction import Store
from tests.web.conftest import Served
from tests.web.steps import button

WEBSOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport="


def ask(served, method, path, **headers):
    place = urlsplit(served.address)
    link = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    link.request(method, path, headers=headers)
    answer = link.getresponse()
    answer.read()
    link.close()
    return answer.status


def opened(served, **headers):
    """Status of the answer to a websocket's handshake."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    return ask(
        served, "GET", f"{WEBSOCKET}websocket", **upgrade, Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==", **headers
    )


def test_only_our_own_page_gets_through(served):
    ours = served.address
    assert ask(served, "GET", "/") == 200
    assert ask(served, "GET", "/", Host="evil.example") == 403
    assert ask(served, "POST", "/", Origin="http://evil.example") == 403
    assert ask(served, "POST", f"{WEBSOCKET}polling", Origin="http://evil.example", Content_Length="0") == 403
    assert ask(served, "GET", f"{WEBSOCKET}polling", Origin="http://evil.example") == 403
    assert opened(served, Origin="http://evil.example") == 403
    assert opened(served, Origin="null") == 403
    assert opened(served) == 403
    assert opened(served, Origin="http://evil.example:80", Host="evil.example:80") == 403
    assert opened(served, Origin=ours) == 101


def test_another_sites_page_in_the_same_browser(chromium, served):
    context = chromium.new_context()
    other = context.new_page()
    other.route("http://evil.example/*", lambda route: route.fulfill(body="<p>hello", content_type="text/html"))
    other.goto("http://evil.example/")
    tried = """async (address) => {
        const read = await fetch(address + '/').then((a) => a.text()).catch(() => 'no');
        const socket = await new Promise((done) => {
            const place = '/_nicegui_ws/socket.io/?EIO=4&transport=websocket';
            const one = new WebSocket(address.replace('http', 'ws') + place);
            one.onopen = () => done('open'); one.onerror = () => done('no');
        });
        return [read, socket];
    }"""
    assert other.evaluate(tried, served.address) == ["no", "no"]
    context.close()


def test_it_listens_on_this_machine_only(served):
    port = urlsplit(served.address).port
    addresses = {one[4][0] for one in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with socket.socket() as link:
            link.settimeout(5)
            assert link.connect_ex((address, port)) != 0


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/_nicegui/../../../etc/passwd", "/static/x", "/artifacts/aios.db"]
)
def test_no_file_is_served(served, path):
    assert ask(served, "GET", path) in (400, 403, 404)


def test_a_token_opens_the_page(chromium, root):
    served = Served(root, "--token", "a word")
    try:
        context = chromium.new_context()
        page = context.new_page()
        assert page.goto(served.address + "/goals").status == 401
        page.goto(served.address + "/goals?token=a+word")
        expect(page).to_have_url(served.address + "/goals")
        expect(page.get_by_text("1: Know licences")).to_be_visible()
        page.get_by_label("New goal").fill("Through the websocket")
        button(page, "Add").click()
        expect(page.get_by_text("2: Through the websocket")).to_be_visible()
        context.close()
    finally:
        served.stop()


def test_fifty_megabytes_pasted_do_no_harm(chromium, root, served):
    context = chromium.new_context()
    page = context.new_page()
    said = []
    page.on("console", lambda line: said.append(line.text))
    page.goto(served.address + "/goals")
    # Past the field's own limit, as a page that was tampered with would.
    page.get_by_label("New goal").evaluate(
        "(one) => { one.maxLength = 1e9; one.value = 'x'.repeat(5e7);"
        " one.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    deadline = time.monotonic() + 30
    while not any("exceeds the maximum" in line for line in said) and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    assert any("exceeds the maximum" in line for line in said)
    context.close()
    assert ask(served, "GET", "/") == 200
    assert ask(served, "POST", "/", Origin=served.address, Content_Length="50000000") == 413
    assert len(Goals(root).all()) == 1


@pytest.mark.parametrize(("size", "code"), [(900_000, None), (2_000_000, 1009)])
def test_a_message_of_megabytes_closes_the_websocket(served, size, code):
    """The browser's own client stops before it sends so much; another one does not."""
    place = urlsplit(served.address).netloc
    with connect(f"ws://{place}{WEBSOCKET}websocket", origin=served.address) as link:
        assert link.recv(timeout=20)[0] == "0"  # engine.io's greeting
        link.send("3" + "x" * size)  # a pong
        found = None
        try:
            link.recv(timeout=2)
        except TimeoutError:
            pass
        except ConnectionClosed as closed:
            found = closed.rcvd and closed.rcvd.code
    assert found == code
    assert ask(served, "GET", "/") == 200


def test_two_hundred_experts_and_fifty_runs_are_shown_within_two_seconds(page, root):
    small = (root / "artifacts/brains/mixtral/small/metrics.jsonl").read_text()
    with Store(root).change() as tables:
        for number in range(200):
            tables.experts.add(
                ExpertEntry(
                    expert_id=f"expert{number}", parent_expert_id=f"expert{number // 3 - 1}" if number > 5 else None
                )
            )
    for number in range(50):
        place = root / f"artifacts/brains/mixtral/run{number}"
        place.mkdir()
        (place / "metrics.jsonl").write_text(small * 20)
    for path, sign in (("/", "expert0"), ("/training", "Loss, nats per token")):
        begun = time.monotonic()
        page.goto(path)
        expect(page.get_by_text(sign, exact=True).first).to_be_visible()
        took = time.monotonic() - begun
        print(f"{path} took {took:.2f} s")
        assert took < 6  # 2 s on a machine that does nothing else
