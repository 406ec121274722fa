"""Experts: each action by hand, and what is in the files afterwards."""

import json
import re

from playwright.sync_api import expect

from aios.cli import run
from aios.store.experts import Registry
from aios.store.goals import Goals
from tests.web.conftest import TINY
from tests.web.steps import button, choose, says


def count(page, name):
    return page.locator(".count", has_text=name).locator(".number")


def test_counts_table_tree_and_search(page, root):
    Registry(root).create("patents", parent="laws", category="law")
    page.goto("/")
    expect(count(page, "total")).to_have_text("2")
    expect(page.get_by_role("link", name="laws")).to_be_visible()
    page.get_by_label("Search").fill("law patents")
    expect(page.get_by_role("link", name="laws", exact=True)).to_have_count(0)
    expect(page.get_by_role("link", name="patents")).to_be_visible()
    page.get_by_label("Search").fill("nowhere")
    expect(page.get_by_text("No expert has these words.")).to_be_visible()
    page.get_by_label("Search").fill("")
    button(page, "Tree").click()
    expect(page.locator(".q-tree").get_by_text("patents")).to_be_visible()
    page.locator(".q-tree").get_by_text("patents").click()
    expect(page).to_have_url(re.compile("/experts/patents$"))


def test_it_follows_the_registry(page, root):
    page.goto("/")
    expect(count(page, "total")).to_have_text("1")
    Registry(root).create("poems")
    expect(count(page, "total")).to_have_text("2")
    expect(page.get_by_role("link", name="poems")).to_be_visible()


def test_create_and_what_is_refused(page, root):
    page.goto("/")
    button(page, "New expert").click()
    page.get_by_label("Id", exact=True).fill("../poems")
    button(page, "Create").click()
    expect(page.locator(".dialog .wrong")).to_contain_text("'../poems' is not a name")
    page.get_by_label("Id", exact=True).fill("poems")
    page.get_by_label("Name").fill("Verse")
    page.get_by_label("Goal", exact=True).fill("Write verse")
    expect(page.locator(".dialog .command")).to_contain_text(
        f"aios experts create poems --name Verse --goal 'Write verse' --root {root}"
    )
    button(page, "Create").click()
    says(page, "Created poems", "aios experts create poems")
    entry = Registry(root).get("poems")
    assert (entry.name, entry.goals) == ("Verse", ("Write verse",))
    button(page, "New expert").click()
    page.get_by_label("Id", exact=True).fill("odes")
    button(page, "Create").dblclick()
    says(page, "Created odes")
    expect(page.locator(".status .wrong")).to_have_count(0)
    expect(page.get_by_role("link", name="poems")).to_be_visible()


def test_freeze_activate_and_back(page, root):
    page.goto("/experts/laws")
    for name, words, now in (
        ("Freeze", "Froze laws.", (True, True)),
        ("Unfreeze", "laws may be trained.", (False, True)),
        ("Deactivate", "laws is inactive.", (False, False)),
        ("Activate", "laws is active.", (False, True)),
    ):
        button(page, name).click()
        says(page, words, f"aios experts {name.lower()} laws")
        entry = Registry(root).get("laws")
        assert (entry.is_frozen, entry.is_active) == now


def test_parents(page, root):
    registry = Registry(root)
    registry.create("patents")
    page.goto("/experts/patents")
    button(page, "Set parent").click()
    page.locator(".dialog").get_by_role("button", name="Set parent").click()
    says(page, "patents is below laws.", "aios experts set-parent patents laws")
    assert registry.get("laws").child_expert_ids == ("patents",)
    page.goto("/experts/laws")
    button(page, "Set parent").click()
    page.locator(".dialog").get_by_role("button", name="Set parent").click()
    expect(page.locator(".dialog .wrong")).to_contain_text("patents is below laws already")
    button(page, "Cancel").click()
    page.goto("/experts/patents")
    button(page, "Clear parent").click()
    says(page, "patents has no parent.", "aios experts clear-parent patents")
    assert registry.get("laws").child_expert_ids == ()


def test_rename(page, root):
    page.goto("/experts/laws")
    button(page, "Rename").click()
    page.get_by_label("New id").fill("licences")
    page.locator(".dialog").get_by_role("button", name="Rename").click()
    expect(page).to_have_url(re.compile("/experts/licences$"))
    expect(page.get_by_role("heading", name="licences")).to_be_visible()
    assert (root / "artifacts/experts/licences/expert.safetensors").is_file()
    assert not (root / "artifacts/experts/laws").exists()


def test_delete_asks_and_keeps_to_its_policy(page, root):
    registry = Registry(root)
    registry.create("patents", parent="laws")
    page.goto("/experts/laws")
    button(page, "Delete").click()
    button(page, "Cancel").click()
    expect(page.locator(".dialog")).to_have_count(0)
    button(page, "Delete").click()
    page.locator(".dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".dialog .wrong")).to_contain_text("expert laws has children: patents")
    page.get_by_label("Leave those below it without a parent").click()
    expect(page.locator(".dialog .command")).to_contain_text("aios experts delete laws --children orphan --yes")
    page.locator(".dialog").get_by_role("button", name="Delete").click()
    expect(page).to_have_url(re.compile("/$"))
    assert [one.expert_id for one in registry.entries()] == ["patents"]
    assert registry.get("patents").parent_expert_id is None
    assert not (root / "artifacts/experts/laws").exists()


def test_delete_with_all_below_even_if_attached(page, root):
    registry = Registry(root)
    registry.create("patents", parent="laws")
    page.goto("/experts/laws")
    button(page, "Attach").click()
    expect(page.locator(".status .sentence")).to_contain_text("Attached laws to mixtral/small.", timeout=60_000)
    button(page, "Delete").click()
    page.get_by_label("Delete all below it too").click()
    page.get_by_role("checkbox", name="Even if it is attached to a brain").click()
    words = "aios experts delete laws --children cascade --force --yes"
    expect(page.locator(".dialog .command")).to_contain_text(words)
    page.locator(".dialog").get_by_role("button", name="Delete").click()
    expect(page).to_have_url(re.compile("/$"))
    assert registry.entries() == []
    assert not (root / "artifacts/experts/laws").exists()


def test_attach_and_detach(page, root):
    brain = root / "artifacts/brains/mixtral/small"
    page.goto("/experts/laws")
    button(page, "Attach").click()
    expect(page.locator(".status .sentence")).to_contain_text("Attached laws to mixtral/small.", timeout=60_000)
    says(page, "", "aios experts attach laws --brain mixtral/small")
    assert json.loads((brain / "experts.json").read_text())["attached"][0]["expert_id"] == "laws"
    assert Registry(root).get("laws").attached_to == ("mixtral/small",)
    button(page, "Deactivate").click()  # an attached one: the brain is changed too
    expect(page.locator(".status .sentence")).to_contain_text("laws is inactive.", timeout=60_000)
    assert json.loads((brain / "experts.json").read_text())["attached"][0]["active"] is False
    button(page, "Delete").click()
    page.locator(".dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".dialog .wrong")).to_contain_text("detach it first")
    button(page, "Cancel").click()
    button(page, "Detach").click()
    page.locator(".dialog").get_by_role("button", name="Detach").click()
    expect(page.locator(".status .sentence")).to_contain_text("Detached laws from mixtral/small.", timeout=60_000)
    assert not (brain / "experts.json").exists()


def test_renaming_an_attached_expert_tells_its_brain(page, root):
    file = root / "artifacts/brains/mixtral/small/experts.json"
    page.goto("/experts/laws")
    button(page, "Attach").click()
    expect(page.locator(".status .sentence")).to_contain_text("Attached laws to mixtral/small.", timeout=60_000)
    button(page, "Rename").click()
    page.get_by_label("New id").fill("licences")
    expect(page.locator(".dialog .command")).to_contain_text("aios experts rename laws licences")
    page.locator(".dialog").get_by_role("button", name="Rename").click()
    expect(page).to_have_url(re.compile("/experts/licences$"), timeout=60_000)
    assert [one["expert_id"] for one in json.loads(file.read_text())["attached"]] == ["licences"]
    assert Registry(root).get("licences").attached_to == ("mixtral/small",)


def test_attach_to_another_base_takes_force(page, root):
    other = ["train", "--name", "other", *TINY, "--seed", "5", "--max-steps", "4", "--root", str(root)]
    assert run(other) == 0
    page.goto("/experts/laws")
    choose(page, "Brain", "mixtral/other")
    button(page, "Attach").click()
    expect(page.locator(".status .wrong")).to_contain_text("--force", timeout=60_000)
    assert not (root / "artifacts/brains/mixtral/other/experts.json").exists()
    page.get_by_role("checkbox", name="force").click()
    button(page, "Attach").click()
    expect(page.locator(".status .sentence")).to_contain_text("Attached laws to mixtral/other.", timeout=60_000)
    says(page, "", "aios experts attach laws --brain mixtral/other --force")
    file = root / "artifacts/brains/mixtral/other/experts.json"
    assert json.loads(file.read_text())["attached"][0]["expert_id"] == "laws"


def test_goals_of_an_expert(page, root):
    goal, _ = Goals(root).add("Write verse")
    page.goto("/experts/laws")
    choose(page, "Goal", "Write verse")
    button(page, "Link").click()
    says(page, f"Goal {goal.id} is linked to laws.", f"aios goals link-expert {goal.id} laws")
    assert set(Registry(root).get("laws").goals) == {"Know licences", "Write verse"}
    button(page, "Unlink goal 1 from laws").click()
    says(page, "Goal 1 is linked to no expert.", "aios goals unlink-expert 1 laws")
    assert Registry(root).get("laws").goals == ("Write verse",)


def test_an_expert_that_is_not_there(page):
    for odd in ("ghost", "..", "..%5C..%5Cetc", "%3Cimg%20src=x%20onerror=alert(1)%3E"):
        page.goto(f"/experts/{odd}")
        if odd != "..":  # a browser makes that the first page
            expect(page.get_by_text("There is no expert")).to_be_visible()
    assert page.request.get("/experts/..%2F..%2Fetc%2Fpasswd").status == 404


def test_names_and_goals_are_text(page, root):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    Registry(root).create("evil", name=evil, description=evil, category=evil, goals=[evil])
    page.goto("/")
    expect(page.get_by_role("cell", name=evil)).to_be_visible()
    page.goto("/experts/evil")
    expect(page.get_by_text(evil).first).to_be_visible()
    page.goto("/goals")
    expect(page.get_by_text(evil).first).to_be_visible()
    assert page.locator("img[src=x]").count() == 0


def test_a_damaged_registry_is_shown_in_the_commands_sentence(page, root):
    file = Registry(root).file
    kept = file.read_text()
    page.goto("/")
    file.write_text("{")
    expect(page.locator(".wrong").first).to_contain_text("registry.json is damaged")
    page.goto("/experts/laws")
    expect(page.get_by_role("heading", name="laws")).to_be_visible()
    expect(page.get_by_text("registry.json is damaged")).to_be_visible()
    page.goto("/")
    file.write_text(kept)
    expect(page.get_by_role("link", name="laws")).to_be_visible()
