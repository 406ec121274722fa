"""Goals: each action by hand, and what is stored afterwards."""

import contextlib
import io
import json
import shlex

from playwright.sync_api import expect

from aios.cli import run
from aios.store.goals import Goals
from tests.web.steps import button, choose, reach, says


def test_add_weigh_link_turn_and_remove(page, root):
    goals = Goals(root)
    page.goto("/goals")
    page.get_by_label("New goal").fill("Write 'verse'")
    button(page, "Add").click()
    says(page, "Added goal 2, linked to no expert.", "aios goals add 'Write '\"'\"'verse'\"'\"'' --weight 1")
    assert [goal.text for goal in goals.all()] == ["Write 'verse'", "Know licences"]
    card = page.locator("section", has_text="2: Write 'verse'")

    page.get_by_label("Weight of goal 2").fill("0.5")
    page.keyboard.press("Enter")
    says(page, "Goal 2 has weight 0.5.", "aios goals weigh 2 0.5")
    assert goals.get(2).weight == 0.5

    choose(page, "Expert for goal 2", "laws")
    card.get_by_role("button", name="Link", exact=True).click()
    says(page, "Goal 2 is linked to laws.", "aios goals link-expert 2 laws")
    assert len(goals.get(2).experts) == 1
    card.get_by_role("button", name="Deactivate").click()
    says(page, "Goal 2 is inactive.", "aios goals deactivate 2")
    assert not goals.get(2).active
    card.get_by_role("button", name="Activate").click()
    says(page, "Goal 2 is active.")
    card.get_by_role("button", name="Unlink laws").click()
    says(page, "Goal 2 is linked to no expert.", "aios goals unlink-expert 2 laws")
    assert goals.get(2).experts == ()

    card.get_by_role("button", name="Remove").click()
    page.locator(".dialog").get_by_role("button", name="Keep").click()
    assert len(goals.all()) == 2
    card.get_by_role("button", name="Remove").click()
    page.locator(".dialog").get_by_role("button", name="Remove").click()
    says(page, "Removed goal 2.", "aios goals remove 2")
    assert [goal.id for goal in goals.all()] == [1]


def test_a_press_after_a_weight_does_both(page, root):
    goals = Goals(root)
    page.goto("/goals")
    page.get_by_label("Weight of goal 1").fill("0.4")
    press = button(page, "Deactivate")
    press.hover()
    page.mouse.down()  # the field is left, and its weight stored, while the button is held
    page.wait_for_timeout(700)
    page.mouse.up()
    says(page, "Goal 1 is inactive.")
    assert (goals.get(1).weight, goals.get(1).active) == (0.4, False)
    page.get_by_label("Weight of goal 1").fill("0.6")
    page.keyboard.press("Enter")
    says(page, "Goal 1 has weight 0.6.", "aios goals weigh 1 0.6")
    assert (goals.get(1).weight, goals.get(1).active) == (0.6, False)


def test_what_is_being_typed_stays_when_another_goal_comes(page, root):
    page.goto("/goals")
    page.get_by_label("Weight of goal 1").fill("0.33")
    Goals(root).add("Write verse")
    expect(page.get_by_text("2: Write verse")).to_be_visible()
    expect(page.get_by_label("Weight of goal 1")).to_have_value("0.33")
    page.get_by_label("Weight of goal 1").press("Enter")
    says(page, "Goal 1 has weight 0.33.")
    assert Goals(root).get(1).weight == 0.33


def test_what_is_refused_is_shown(page, root):
    page.goto("/goals")
    button(page, "Add").click()
    expect(page.locator(".status .wrong")).to_contain_text("goal")
    assert len(Goals(root).all()) == 1


def test_it_follows_the_database(page, root):
    page.goto("/goals")
    expect(page.get_by_text("1: Know licences")).to_be_visible()
    Goals(root).add("Write verse")
    expect(page.get_by_text("2: Write verse")).to_be_visible()


def test_sliders_measure_what_the_active_goals_do(page, root):
    assert run(["experts", "attach", "laws", "--brain", "small", "--root", str(root)]) == 0
    Goals(root).add("Sound like Python", expert="mixtral/small:1.2")
    page.goto("/goals")
    expect(page.get_by_text("Give a text, then move a slider.")).to_be_visible()
    page.get_by_label("Text", exact=True).fill("The law of the land is hereby granted")
    words = page.locator("[role=status]", has_text="On this text")
    expect(words).to_contain_text("output KL", timeout=90_000)
    says(page, "Measured.", "--goals-active")
    first = words.text_content()
    slider = page.get_by_role("slider", name="Strength for the gates of attached experts")
    reach(page, lambda: slider.evaluate("(one) => one.contains(document.activeElement)"))
    page.keyboard.press("PageUp")
    expect(page.get_by_text("attached experts: 5 nats")).to_be_visible()
    says(page, "Measured.", "--goals-active --goal-strength 5")
    expect(words).to_contain_text("expert laws: +2.50 nats")
    assert words.text_content() != first
    page.keyboard.press("Tab")
    page.keyboard.press("PageUp")
    says(page, "Measured.", "--goal-strength 5 --goal-kl 0.1")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run([*shlex.split(page.locator(".status .command").text_content() or "")[1:], "--json"]) == 0
    found = json.loads(printed.getvalue())
    expect(words).to_contain_text(f"output KL {found['text_kl']:.5f}")
    row = page.get_by_role("row", name="layer 1, expert 2")
    expect(row).to_contain_text(f"{found['off']['share'][1][2]:.1%}")
    expect(row).to_contain_text(f"{found['on']['share'][1][2]:.1%}")
