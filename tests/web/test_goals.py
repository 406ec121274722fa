"""Goals: each action by hand, and what is stored afterwards."""

from playwright.sync_api import expect

from aios.goals.links import Goals
from tests.web.steps import button, choose, told


def test_add_weigh_link_turn_and_remove(page, root):
    goals = Goals(root)
    page.goto("/goals")
    page.get_by_label("New goal").fill("Write 'verse'")
    button(page, "Add").click()
    told(page, "Added the goal.", "aios goals add 'Write '\"'\"'verse'\"'\"'' --weight 1")
    assert [goal.text for goal in goals.all()] == ["Write 'verse'", "Know licences"]
    card = page.locator("section", has_text="2: Write 'verse'")

    page.get_by_label("Weight of goal 2").fill("0.5")
    page.keyboard.press("Enter")
    told(page, "Goal 2 has weight 0.5.", "--weight 0.5")
    assert goals.get(2).weight == 0.5

    choose(page, "Expert for goal 2", "laws")
    card.get_by_role("button", name="Link", exact=True).click()
    told(page, "Goal 2 is linked to laws.", "aios goals link-expert 2 laws")
    assert len(goals.get(2).experts) == 1
    card.get_by_role("button", name="Deactivate").click()
    told(page, "Goal 2 is deactivated.", "aios goals deactivate 2")
    assert not goals.get(2).active
    card.get_by_role("button", name="Activate").click()
    told(page, "Goal 2 is activated.")
    card.get_by_role("button", name="Unlink laws").click()
    told(page, "Goal 2 is not linked to laws.", "aios goals unlink-expert 2 laws")
    assert goals.get(2).experts == ()

    card.get_by_role("button", name="Remove").click()
    page.locator(".dialog").get_by_role("button", name="Keep").click()
    assert len(goals.all()) == 2
    card.get_by_role("button", name="Remove").click()
    page.locator(".dialog").get_by_role("button", name="Remove").click()
    told(page, "Removed goal 2.", "aios goals remove 2")
    assert [goal.id for goal in goals.all()] == [1]


def test_what_is_refused_is_told(page, root):
    page.goto("/goals")
    button(page, "Add").click()
    expect(page.locator(".told .wrong")).to_contain_text("goal")
    assert len(Goals(root).all()) == 1


def test_it_follows_the_database(page, root):
    page.goto("/goals")
    expect(page.get_by_text("1: Know licences")).to_be_visible()
    Goals(root).add("Write verse")
    expect(page.get_by_text("2: Write verse")).to_be_visible()
