"""Chat: a real brain answers piece by piece, is stopped, and goes on; what is said is text."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect

from aios.cli import run
from tests.web.conftest import thinker
from tests.web.steps import button, choose, reach, says

FIRST = 90_000


def say(page, words):
    page.get_by_label("Say something").fill(words)
    button(page, "Send").click()


def done(page, number=0):
    note = page.get_by_role("log").locator(".soft").nth(number)
    expect(note).to_contain_text("tokens/s", timeout=FIRST)
    return note


def test_it_answers_as_the_shown_command_does(page, root):
    page.goto("/chat")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Top-k (0: all)").fill("7")
    said = "The people <img src=x onerror=alert(1)>"
    say(page, said)
    note = done(page)
    assert re.match(r"\d+ tokens, \d+\.\d tokens/s", note.text_content() or "")
    expect(note).to_contain_text("layer 0: experts")
    says(page, "tokens", "aios chat mixtral/small --max-new-tokens 12 --temperature 0.5 --top-k 7 --seed 3")
    command = page.locator(".status .command").text_content() or ""
    printed = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], input=said + "\n", capture_output=True, text=True, timeout=120
    )
    answer = page.get_by_role("log").locator(".panel .talk").first.text_content() or ""
    assert printed.stdout == f"> {answer}\n> ", printed.stderr
    assert page.locator("img[src=x]").count() == 0
    # The second turn goes on from the first.
    say(page, "and then")
    done(page, 1)
    expect(page.get_by_role("log").locator(".you")).to_have_count(2)
    button(page, "New talk").click()
    expect(page.get_by_role("log").locator(".you")).to_have_count(0)


def test_an_hrm_tells_its_segments_and_takes_a_limit(page, root):
    assert run(thinker(root)) == 0
    page.goto("/chat")
    expect(page.get_by_label("Most segments")).to_be_hidden()
    choose(page, "Brain", "actv1/thinker")
    page.get_by_label("Most tokens").fill("6")
    say(page, "The law of the land")
    segments = re.search(r"(\d\.\d\d) of 2 segments a token", done(page).text_content() or "")
    assert segments
    assert 1 <= float(segments[1]) <= 2
    says(page, "tokens", "aios chat actv1/thinker")
    choose(page, "Halting", "max")
    say(page, "and then")
    expect(done(page, 1)).to_contain_text("2.00 of 2 segments a token")
    page.get_by_label("Most segments").fill("1")
    say(page, "and then")
    expect(done(page, 2)).to_contain_text("1.00 of 2 segments a token")
    says(page, "tokens", "--halt max --segments 1")
    page.get_by_label("Most segments").fill("3")
    say(page, "and then")
    expect(page.locator(".status .wrong")).to_contain_text("this brain was trained with 1 to 2", timeout=FIRST)


def test_it_is_stopped_and_goes_on(page, root):
    # Long enough to be stopped: the tiny brain reads 32 tokens at most as it was trained, so let it read more.
    file = root / "artifacts/brains/mixtral/small/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 100_000}))
    page.goto("/chat")
    page.get_by_label("Most tokens").fill("40000")
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Top-k (0: all)").fill("0")
    say(page, "The people")
    expect(page.get_by_role("log").locator(".panel .talk").first).to_have_text(re.compile(r"\S"), timeout=FIRST)
    before = page.get_by_role("log").locator(".panel .talk").first.text_content() or ""
    page.wait_for_timeout(400)
    assert len(page.get_by_role("log").locator(".panel .talk").first.text_content() or "") > len(before)
    button(page, "Stop").click()
    expect(done(page)).to_contain_text("stopped")
    page.get_by_label("Most tokens").fill("5")
    say(page, "and then")
    done(page, 1)


def test_ending_the_manager_ends_an_answer(chromium, served):
    context = chromium.new_context(base_url=served.address)
    page = context.new_page()
    file = served.root / "artifacts/brains/mixtral/small/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 100_000}))
    page.goto("/chat")
    page.get_by_label("Most tokens").fill("40000")
    say(page, "The people")
    expect(page.get_by_role("log").locator(".panel .talk").first).to_have_text(re.compile(r"\S"), timeout=FIRST)
    (child,) = children(served.process.pid)
    assert "libtorch" not in Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{child}/maps").read_text()
    assert served.stop() == 0
    context.close()
    assert not Path(f"/proc/{child}").exists()


def test_a_brain_that_died_is_reported_and_the_next_answer_comes(page, served):
    import os
    import signal

    page.goto("/chat")
    page.get_by_label("Most tokens").fill("5")
    say(page, "The people")
    done(page)
    os.kill(children(served.process.pid)[0], signal.SIGKILL)
    page.wait_for_timeout(500)
    say(page, "and then")
    done(page, 1)
    button(page, "New talk").click()
    page.get_by_label("Top-p", exact=True).fill("0")
    say(page, "and then")
    expect(page.locator(".status .wrong")).to_contain_text("top_p above 0")
    page.get_by_label("Top-p", exact=True).fill("7")  # said as the command says it, not set right in silence
    button(page, "Close the status bar").click()
    say(page, "and then")
    expect(page.locator(".status .wrong")).to_contain_text("top_p above 0 and at most 1")


def test_goals_and_keys(page, root):
    page.goto("/chat")
    for name in ("Brain", "Goals", "Strength, nats", "KL budget, nats", "Temperature", "Top-p", "Top-k (0: all)",
                 "Most tokens", "Seed", "Say something"):  # fmt: skip
        field = page.get_by_label(name, exact=True)
        reach(page, lambda field=field: field.evaluate("(one) => one === document.activeElement"))
    page.keyboard.type("The people")
    reach(page, lambda: button(page, "Send").evaluate("(one) => one === document.activeElement"))
    page.get_by_label("Goals", exact=True).click()
    page.get_by_role("option", name="Know licences").click()
    page.keyboard.press("Escape")
    button(page, "Send").focus()
    page.keyboard.press("Enter")
    # The expert is not attached: the goal is said to do nothing there.
    expect(done(page)).to_contain_text("expert laws is not in this brain")
    says(page, "tokens", "--goal 1")


def children(pid):
    """Of the brain's kind: spawned to run, not to track."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            words = (place / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == pid and "spawn_main" in words:
            found.append(int(place.name))
    return found
