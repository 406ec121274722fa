"""Pictures of every page at both widths, for docs/screenshots:

    python -m tests.web.screenshots WORKSPACE FOLDER

A WORKSPACE that is not there is made first, in some five minutes. Afterwards look at them.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from aios.cli import run
from tests.web.conftest import Served
from tests.web.steps import button, choose

WIDTHS = (1280, 390)
SAID = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to deal in it."
SLOW = 90_000
HEIGHT = "Math.max(innerHeight, document.documentElement.scrollHeight)"


def make(root: Path) -> None:
    """A brain of two domains, a second run to compare it with, an expert attached to it, goals."""
    data, two = root / "training_data", root / "two"
    small = ["--data", str(two), "--seq-len", "128", "--eval-every-n-steps", "100", "--log-every-n-steps", "20"]
    fast = ["--learning-rate", "4e-3"]
    for words in (
        ["init", "--max-bytes", "2000000", "--vocab-size", "2048"],
        ["data", "prepare", f"oratory={data / 'oratory'}", f"python={data / 'python'}", "--out", str(two),
         "--tokenizer", str(root / "artifacts/hf_implant/base_model")],
        ["train", "--name", "small", "--max-steps", "600", *small, *fast],
        ["train", "--name", "unsteered", "--max-steps", "300", *small, *fast, "--control", "aux"],
        ["experts", "create", "laws", "--name", "Licences", "--category", "law"],
        ["experts", "train", "laws", "--brain", "small", "--dataset-file", str(data / "licences"), "--steps", "200"],
        ["experts", "create", "patents", "--parent", "laws", "--category", "law"],
        ["experts", "attach", "laws", "--brain", "small"],
        ["goals", "add", "Know licences", "--expert-id", "laws"],
        ["goals", "add", "Sound like Python"],
        ["goals", "link-expert", "2", "mixtral/small:1.3"],
    ):  # fmt: skip
        if run([*words, *(() if words[0] == "data" else ("--root", str(root)))]) != 0:
            raise SystemExit(f"aios {' '.join(words)}: failed")


def experts(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("link", name="patents", exact=True)).to_be_visible()


def expert(page: Page) -> None:
    page.goto("/experts/laws")
    expect(page.get_by_text("What is known")).to_be_visible()


def dialog_new(page: Page) -> None:
    experts(page)
    button(page, "New expert").click()
    page.get_by_label("Id", exact=True).fill("poems")
    page.get_by_label("Goal", exact=True).fill("Write verse")
    expect(page.locator(".dialog .command")).to_contain_text("poems")


def dialog_delete(page: Page) -> None:
    expert(page)
    button(page, "Delete").click()
    expect(page.locator(".dialog")).to_be_visible()


def goals(page: Page) -> None:
    page.goto("/goals")
    page.get_by_label("Text", exact=True).fill(SAID)
    expect(page.locator("[role=status]", has_text="On this text")).to_contain_text("output KL", timeout=SLOW)


def training(page: Page) -> None:
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    expect(page.locator("canvas").first).to_be_visible()


def compared(page: Page) -> None:
    training(page)
    page.get_by_label("Compare with").click()
    page.locator(".q-menu").get_by_role("option", name="unsteered").click()
    page.wait_for_timeout(1000)


def new_run(page: Page) -> None:
    page.goto("/training/new")
    page.get_by_label("Name of the brain").fill("verse")
    button(page, "Show the plan").click()
    expect(page.get_by_role("region", name="Plan")).to_contain_text("parameters", timeout=SLOW)


def routing(page: Page) -> None:
    page.goto("/routing")
    choose(page, "Take held-out text of", "oratory")
    page.wait_for_function("document.querySelector('textarea').value.length > 100", timeout=SLOW)
    choose(page, "Goals", "Sound like Python")
    page.keyboard.press("Escape")
    button(page, "Inspect").click()
    expect(page.locator(".flow")).to_have_count(2, timeout=SLOW)
    choose(page, "Layer", "1")
    page.locator(".flow .token").nth(9).hover()


def chat(page: Page) -> None:
    page.goto("/chat")
    page.get_by_label("Most tokens").fill("80")
    page.get_by_label("Say something").fill("My fellow citizens of the Senate")
    button(page, "Send").click()
    expect(page.get_by_role("log").locator(".soft").first).to_contain_text("tokens/s", timeout=SLOW)


def jobs(page: Page) -> None:
    page.goto("/jobs")
    if not page.get_by_role("link", name="Train verse").count():
        page.get_by_label("Id of the expert").fill("verse")
        page.get_by_label("Text of the domain").fill("training_data/oratory")
        for name, value in {"steps": "40", "max seq len": "64", "eval tokens": "2000"}.items():
            page.get_by_label(name, exact=True).fill(value)
        button(page, "Train").click()
        expect(page.locator(".mark")).to_have_text("done", timeout=3 * SLOW)
        page.goto("/jobs")
    expect(page.get_by_role("link", name="Train verse")).to_be_visible()


def job(page: Page) -> None:
    jobs(page)
    page.get_by_role("link", name="Train verse").click()
    expect(page.locator(".log")).to_contain_text("Next:")


PAGES: dict[str, Callable[[Page], None]] = {
    "experts": experts, "expert": expert, "goals": goals, "training": training, "new-run": new_run,
    "routing": routing, "chat": chat, "jobs": jobs, "job": job,
}  # fmt: skip
DIALOGS: dict[str, Callable[[Page], None]] = {
    "compared": compared, "dialog-new": dialog_new, "dialog-delete": dialog_delete,
}  # fmt: skip


def side_by_side(folder: Path, width: int) -> None:
    """One picture of all pages, the beginning of each."""
    shown, gap, columns, high = (420, 16, 3, 420) if width == max(WIDTHS) else (240, 12, 5, 560)
    rows = -(-len(PAGES) // columns)
    sheet = Image.new("RGB", (columns * (shown + gap) + gap, rows * (high + gap) + gap), "#c8d2de")
    for number, name in enumerate(PAGES):
        picture = Image.open(folder / f"{name}-{width}.png").convert("RGB")
        picture = picture.resize((shown, round(picture.height * shown / picture.width)), Image.Resampling.LANCZOS)
        row, column = divmod(number, columns)
        tile = Image.new("RGB", (shown, high), picture.getpixel((shown - 2, picture.height - 2)))
        tile.paste(picture, (0, 0))
        sheet.paste(tile, (gap + column * (shown + gap), gap + row * (high + gap)))
    sheet.save(folder / f"pages-{width}.png", optimize=True)


def main(root: Path, folder: Path, *names: str) -> None:
    if not root.exists():
        make(root)
    folder.mkdir(parents=True, exist_ok=True)
    served = Served(root.resolve())
    with contextlib.ExitStack() as stack:
        stack.callback(served.stop)
        play = stack.enter_context(sync_playwright())
        place = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = play.chromium.launch(executable_path=place, args=["--no-sandbox"])
        for width in WIDTHS:
            for name, go in (PAGES | DIALOGS).items():
                if names and name not in names:
                    continue
                context = browser.new_context(viewport={"width": width, "height": 844}, base_url=served.address)
                page = context.new_page()
                go(page)
                if "dialog" not in name:  # as high as the page: what sticks to top and bottom would cut a long picture
                    page.set_viewport_size({"width": width, "height": page.evaluate(HEIGHT)})
                page.wait_for_timeout(1500)  # charts draw themselves in
                page.screenshot(path=folder / f"{name}-{width}.png")
                context.close()
                print(f"{name}-{width}.png")
            side_by_side(folder, width)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
