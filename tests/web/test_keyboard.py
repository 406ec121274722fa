"""Without a mouse: every control is reached with Tab, is seen to be, has a name, and acts on Enter or Space."""

import re

import pytest
from playwright.sync_api import expect

from aios.store.experts import Registry
from aios.store.goals import Goals
from tests.web.steps import PAGES, button, says

CONTROLS = """() => [...document.querySelectorAll('a[href], button, input, textarea, [tabindex="0"]')]
    .filter((one) => one.tabIndex >= 0 && !one.disabled && one.checkVisibility() && one.getClientRects().length)
    .map((one, number) => {
        one.dataset.walked = number;
        const label = one.labels && one.labels.length ? one.labels[0].innerText : '';
        const name = one.getAttribute('aria-label') || label || one.innerText
            || one.closest('.q-slider')?.getAttribute('aria-label') || '';
        return [name.trim(), one.outerHTML.slice(0, 200)];
    })"""
FOCUSED = """() => {
    const one = document.activeElement, style = getComputedStyle(one);
    const outlined = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0
        || style.boxShadow !== 'none';
    const seen = outlined || !!one.closest('.q-field--focused');
    return [Number(one.dataset.walked ?? -1), seen, one.outerHTML.slice(0, 200)];
}"""


@pytest.mark.parametrize(("path", "sign"), PAGES)
def test_tab_reaches_every_control(page, path, sign):
    page.goto(path)
    expect(page.get_by_text(sign, exact=True).first).to_be_visible()
    expect(page.get_by_role("navigation")).to_be_visible()
    page.wait_for_function("window.socket && window.socket.connected")  # before that it may be drawn anew
    controls = page.evaluate(CONTROLS)
    assert len(controls) > 6
    assert [html for name, html in controls if not name] == []
    reached = []
    for _ in controls:
        page.keyboard.press("Tab")
        number, seen, html = page.evaluate(FOCUSED)
        assert seen, f"the focus is not to be seen: {html}"
        reached.append(number)
    assert [html for number, (_, html) in enumerate(controls) if number not in reached] == []


def test_an_expert_is_made_frozen_and_left_in_peace(page, root):
    page.goto("/")
    button(page, "New expert").press("Enter")
    expect(page.get_by_label("Id", exact=True)).to_be_focused()
    page.keyboard.type("poems")
    page.locator(".dialog").get_by_role("button", name="Create").press("Space")
    says(page, "Created poems")
    page.get_by_role("link", name="poems").press("Enter")
    expect(page).to_have_url(re.compile("/experts/poems$"))
    button(page, "Freeze").press("Space")
    says(page, "Froze poems.")
    assert Registry(root).get("poems").is_frozen
    button(page, "Delete").press("Enter")
    expect(page.locator(".dialog").get_by_role("button", name="Cancel")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".dialog")).to_have_count(0)
    assert Registry(root).get("poems")


def test_the_table_is_sorted_and_the_tree_is_opened(page, root):
    Registry(root).create("acts")
    page.goto("/")
    links = page.locator("td a")
    expect(links.first).to_have_text("laws")
    page.get_by_role("columnheader", name="Expert").press("Enter")
    expect(links.first).to_have_text("acts")
    button(page, "Tree").press("Enter")
    page.locator(".q-tree__node-header", has_text="acts").press("Enter")
    expect(page).to_have_url(re.compile("/experts/acts$"))


def test_a_goal_is_added_and_laid_to_rest(page, root):
    page.goto("/goals")
    page.get_by_label("New goal").press_sequentially("Be brief")
    button(page, "Add").press("Enter")
    says(page, "Added goal 2, linked to no expert.")
    page.locator("section", has_text="2: Be brief").get_by_role("button", name="Deactivate").press("Space")
    says(page, "Goal 2 is inactive.")
    assert not Goals(root).get(2).active


def test_runs_and_layers_are_chosen(page, root):
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    layer = page.get_by_label("Layer", exact=True)
    expect(layer).to_be_visible()
    layer.press("Enter")
    expect(page.get_by_role("option", name="1")).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(layer).to_have_value("1")
    button(page, "New run").press("Enter")
    expect(page).to_have_url(re.compile("/training/new$"))
