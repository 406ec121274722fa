"""What tests do and look at again and again."""

from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect

PAGES = [
    ("/", "orphaned"),
    ("/experts/laws", "What is known"),
    ("/goals", "1: Know licences"),
    ("/training?run=artifacts/brains/mixtral/small/metrics.jsonl", "Structural temperature"),
    ("/training/new", "Show the plan"),
    ("/jobs", "Train an expert"),
]
"""Paths, and what each shows once it is there."""


def says(page: Page, words: str, command: str = "") -> None:
    """The strip at the bottom says this."""
    expect(page.locator(".status .sentence")).to_contain_text(words)
    if command:
        expect(page.locator(".status .command")).to_contain_text(command)


def button(page: Page, name: str) -> Locator:
    """A button by its whole name."""
    return page.get_by_role("button", name=name, exact=True)


def choose(page: Page, label: str, option: str) -> None:
    """Choose in a list."""
    page.get_by_label(label, exact=True).click()
    page.locator(".q-menu").get_by_role("option", name=option).click()


def reach(page: Page, there: Callable[[], bool], most: int = 80) -> None:
    """Press Tab until it is there."""
    for _ in range(most):
        if there():
            return
        page.keyboard.press("Tab")
    raise AssertionError("Tab does not lead there")
