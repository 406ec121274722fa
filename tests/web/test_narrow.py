"""A telephone: nothing runs out of the window sideways, and what is done is done as on a wide one."""

import re

import pytest
from playwright.sync_api import expect

from aios.store.experts import Registry
from aios.store.goals import Goals
from tests.web.steps import PAGES, button

TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter(one => {
    const box = one.getBoundingClientRect();
    if (!box.width || !box.height || box.right <= innerWidth + 1) return false;
    for (let up = one.parentElement; up; up = up.parentElement)  // scrolled or cut off in a frame of its own
        if (/auto|scroll|hidden/.test(getComputedStyle(up).overflowX) && up !== document.body) return false;
    return true;
}).map(one => one.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize(("path", "sign"), [*PAGES, ("/routing", "Inspect"), ("/chat", "Send")])
def test_pages_fit(page, path, sign):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(path)
    expect(page.get_by_text(sign, exact=True).first).to_be_visible()
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(TOO_WIDE) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_long_words_fit(page, root, width):
    registry, word = Registry(root), "x" * 64
    registry.create(word, parent="laws")
    Goals(root).add("W" * 900, expert=word)
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/goals", f"/experts/{word}", "/"):
        page.goto(path)
        expect(page.get_by_text(word).first).to_be_visible()
        if path == "/":
            button(page, "Tree").click()
            expect(page.locator(".q-tree").get_by_text(word)).to_be_visible()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.evaluate(TOO_WIDE) == [], path
    page.goto("/goals")
    button(page, "Deactivate").first.click()
    status = page.locator(".status")
    expect(status).to_be_visible()
    assert status.bounding_box()["height"] < 300


def test_an_expert_is_made_and_deleted(page, root):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto("/")
    button(page, "New expert").click()
    page.get_by_label("Id", exact=True).fill("maps")
    button(page, "Create").click()
    expect(page.get_by_role("link", name="maps", exact=True)).to_be_visible()
    page.get_by_role("link", name="maps", exact=True).click()
    button(page, "Delete").click()
    dialog = page.locator(".dialog")
    expect(dialog).to_be_visible()
    box = dialog.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    dialog.get_by_role("button", name="Delete").click()
    expect(page).to_have_url(re.compile("/$"))
    assert [one.expert_id for one in Registry(root).entries()] == ["laws"]
