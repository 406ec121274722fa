"""Routing: tokens, experts and shares of a real brain, goals off and on; by mouse and by keys."""

import re

import pytest
from playwright.sync_api import expect

from aios.cli import run
from aios.store.goals import Goals
from tests.web.conftest import thinker
from tests.web.steps import button, choose, reach, says

FIRST = 90_000
"""Milliseconds for the first answer: a process begins, torch is imported, a brain read."""


def inspect(page, text):
    page.get_by_label("Text", exact=True).fill(text)
    button(page, "Inspect").click()
    expect(page.locator(".flow").first).to_be_visible(timeout=FIRST)


def test_tokens_shares_and_goals_side_by_side(page, root):
    goals = Goals(root)
    goal, _ = goals.add("Sound like Python", expert="mixtral/small:1.2")
    page.goto("/routing")
    choose(page, "Take held-out text of", "licences")
    expect(page.get_by_label("Text", exact=True)).to_have_value(re.compile(".{100}", re.S), timeout=FIRST)
    button(page, "Inspect").click()
    says(page, "No goal is on.", "aios goals explain --brain mixtral/small --text=-")
    expect(page.locator(".flow")).to_have_count(1)
    expect(page.locator(".shares")).to_contain_text("held-out licences")
    shares = page.locator(".shares tbody tr td:nth-child(2)").all_text_contents()
    assert sum(float(one.strip("%")) for one in shares[:4]) == pytest.approx(100, abs=0.5)

    choose(page, "Goals", "Sound like Python")
    page.keyboard.press("Escape")
    page.get_by_label("KL budget, nats").fill("0.5")
    button(page, "Inspect").click()
    says(page, "Goals: Sound like Python", f"--goal {goal.id} --goal-kl 0.5")
    choose(page, "Layer", "1")
    expect(page.locator(".flow")).to_have_count(2)
    heading = page.get_by_role("heading", name="Goals on")
    expect(heading).to_have_text(re.compile(r"Goals on: [1-9]\d* of \d+ tokens changed"))
    marked = page.locator(".flow").last.locator(".token.changed")
    count = re.search(r"on: (\d+)", heading.text_content())
    assert count is not None
    expect(marked).to_have_count(int(count[1]))
    assert "goals off: expert" in (marked.first.get_attribute("aria-label") or "")


def test_what_a_token_chose_is_shown_to_pointer_and_keys(page):
    page.goto("/routing")
    inspect(page, "The law of the land")
    tokens = page.locator(".flow .token")
    label = tokens.nth(1).get_attribute("aria-label") or ""
    weights = [float(weight) for weight in re.findall(r"expert \d (\d\.\d\d)", label)]
    assert sum(weights) == pytest.approx(1, abs=0.02)
    tip = "(one) => getComputedStyle(one, '::after').content"
    assert tokens.nth(1).evaluate(tip) == "none"
    tokens.nth(1).hover()
    assert "expert" in tokens.nth(1).evaluate(tip)
    page.mouse.move(0, 0)
    reach(page, lambda: tokens.nth(0).evaluate("(one) => one === document.activeElement"))
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    assert "expert" in tokens.nth(1).evaluate(tip)
    page.keyboard.press("ArrowLeft")
    expect(tokens.nth(0)).to_be_focused()
    # What comes after the tokens is one stop away.
    page.keyboard.press("Tab")
    expect(page.get_by_role("region", name="Shares")).to_be_focused()


def test_everything_is_reached_by_tab(page):
    page.goto("/routing")
    for name in ("Brain", "Take held-out text of", "Text", "Goals", "Strength, nats", "KL budget, nats"):
        field = page.get_by_label(name, exact=True)
        reach(page, lambda field=field: field.evaluate("(one) => one === document.activeElement"))
    page.get_by_label("Text", exact=True).fill("The law")
    reach(page, lambda: button(page, "Inspect").evaluate("(one) => one === document.activeElement"))
    page.keyboard.press("Enter")
    expect(page.locator(".flow .token").first).to_be_visible(timeout=FIRST)


def test_gates_of_attached_experts(page, root):
    assert run(["experts", "attach", "laws", "--brain", "small", "--root", str(root)]) == 0
    page.goto("/routing")
    choose(page, "Goals", "Know licences")
    page.keyboard.press("Escape")
    page.get_by_label("Strength, nats").fill("5")
    inspect(page, "The law of the land is hereby granted to any person")
    says(page, "expert laws: +5.00 nats for its gate", "--goal-strength 5")
    expect(page.locator(".shares")).to_contain_text("laws, gate open")
    on = page.locator(".flow").last
    for one in on.locator(".token.attached").all():
        assert "open: laws" in (one.get_attribute("aria-label") or "")
    row = page.locator(".shares tbody tr", has_text="laws, gate open").locator("td").all_text_contents()
    tokens, opened = on.locator(".token").count(), on.locator(".token.attached").count()
    assert row[1] == f"{opened / tokens:.1%}"


def test_an_hrm_and_its_segments(page, root):
    assert run(thinker(root)) == 0
    page.goto("/routing")
    choose(page, "Brain", "actv1/thinker")
    inspect(page, "The law of the land")
    expect(page.locator(".flow .token").nth(1)).to_have_attribute("aria-label", re.compile("segments [12]"))
    choose(page, "Layer", "1 (high)")
    expect(page.locator(".q-menu")).to_have_count(0)
    choose(page, "Segment", "1")
    expect(page.locator(".flow .token").nth(1)).to_have_attribute("aria-label", re.compile(r"expert \d"))


def test_texts_are_text_and_bounded(page):
    evil = "<img src=x onerror=alert(1)>{{ 1 + 1 }}\"'&"
    page.goto("/routing")
    button(page, "Inspect").click()
    expect(page.locator(".status .wrong")).to_contain_text("Type a text first")
    inspect(page, evil)
    assert "".join(page.locator(".flow .token").all_text_contents()) == "▸" + evil
    assert page.locator("img[src=x]").count() == 0
    field = page.get_by_label("Text", exact=True)
    field.evaluate(
        "(one) => { one.maxLength = 1e9; one.value = 'word '.repeat(2e4);"
        " one.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    button(page, "Inspect").click()
    expect(page.locator("[role=status]", has_text="tokens.")).to_contain_text("The brain reads no more", timeout=FIRST)
    assert page.locator(".flow .token").count() <= 4000


def test_without_a_brain_it_says_what_to_do_first(page, root):
    import shutil

    shutil.rmtree(root / "artifacts/brains")
    for path in ("/routing", "/chat", "/goals"):
        page.goto(path)
        expect(page.get_by_text("No brain yet. Train a brain first.")).to_be_visible()
        expect(page.get_by_text("aios train --name small")).to_be_visible()
