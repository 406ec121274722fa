"""Jobs and the curves of runs."""

import json
import re
import shutil
import signal
import time

import pytest
from playwright.sync_api import expect

from aios.manager import charts
from aios.manager.jobs import Jobs
from aios.store.experts import Registry
from aios.store.goals import Goals
from tests.web.conftest import Served
from tests.web.steps import button, choose, says


def wait_until(true):
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for(jobs, job_id, *states):
    wait_until(lambda: jobs.get(job_id).state in states)
    return jobs.get(job_id)


def test_train_an_expert_with_progress_and_log(page, root):
    page.goto("/jobs")
    page.get_by_label("Id of the expert").fill("verse")
    page.get_by_label("Text of the domain").fill("../../etc")
    button(page, "Train").click()
    expect(page.locator("#train .wrong")).to_contain_text("is not in this workspace")
    page.get_by_label("Text of the domain").fill("training_data/oratory")
    page.get_by_label("Goal (may be empty)").fill("Speak well")
    small = {"steps": "8", "batch size": "2", "max seq len": "32", "eval tokens": "300", "calibration windows": "8"}
    for name, value in small.items():
        page.get_by_label(name, exact=True).fill(value)
    command = f"aios experts train verse --dataset-file {root}/training_data/oratory --brain mixtral/small --steps 8"
    expect(page.locator("#train .command")).to_contain_text(command)
    button(page, "Train").dblclick()
    expect(page).to_have_url(re.compile("/jobs/[0-9-]+-expert-0$"))
    expect(page.locator(".mark")).to_have_text("done", timeout=120_000)
    expect(page.locator(".log")).to_contain_text("Next: aios experts attach verse")
    expect(page.get_by_text("step 8 of 8")).to_be_visible()
    entry = Registry(root).get("verse")
    assert (entry.version, entry.goals) == (1, ("Speak well",))
    assert len(Jobs(root).all()) == 1
    page.goto("/jobs")
    expect(page.get_by_role("link", name="Train verse")).to_be_visible()


def form(page, **values):
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)


def test_train_a_brain_with_its_plan_first_then_stop_and_resume_it(page, root, served):
    jobs, brain = Jobs(root), root / "artifacts/brains/mixtral/long"
    page.goto("/training")
    button(page, "New run").click()
    page.get_by_label("Name of the brain").fill("small")
    expect(button(page, "Start training")).to_be_hidden()
    form(page, max_steps="100000", batch_size="2", seq_len="32", log_every_n_steps="5")
    choose(page, "Size", "tiny")
    form(page, hidden_dim="32", num_layers="1")
    choose(page, "Goals (may be empty)", "Know licences")
    page.keyboard.press("Escape")
    button(page, "Show the plan").click()
    wrong = page.locator("section .wrong")
    expect(wrong).to_contain_text(f"the brain {brain.with_name('small')} exists already", timeout=60_000)
    page.get_by_label("Name of the brain").fill("../long")
    button(page, "Show the plan").click()
    expect(wrong).to_contain_text("'../long' is not a name")
    page.get_by_label("Name of the brain").fill("long")
    button(page, "Show the plan").click()
    plan = page.get_by_role("region", name="Plan")
    expect(plan).to_contain_text("1 layers x 4 experts, top-2, width 32", timeout=60_000)
    for word in ("parameters", "memory", "100,000 steps x 64 tokens", "time"):
        expect(plan).to_contain_text(word)
    assert not brain.exists()
    command = page.locator("section .command")
    expect(command).to_contain_text("aios train --name=long --max-steps=100000 --batch-size=2 --seq-len=32")
    expect(command).to_contain_text(f"--goal=1 --root={root}")
    form(page, seed="1")
    expect(plan).to_be_hidden()  # it was of other settings
    expect(button(page, "Start training")).to_be_hidden()
    button(page, "Show the plan").click()
    button(page, "Start training").click(timeout=60_000)
    expect(page).to_have_url(re.compile("/jobs/[0-9-]+-brain-0$"))
    expect(page.locator(".log")).to_contain_text("Step 10", timeout=60_000)
    page.get_by_role("link", name="Its curves").click()
    state = page.locator(".soft", has_text="running")
    expect(state).to_be_visible()
    expect(page.locator("canvas").first).to_be_visible()
    before = state.text_content()
    expect(state).not_to_have_text(before)  # it follows
    (job,) = jobs.all()

    page.goto("about:blank")  # or it would complain of the manager that is gone
    served.stop(signal.SIGKILL)
    step = len((brain / "metrics.jsonl").read_text())
    wait_until(lambda: len((brain / "metrics.jsonl").read_text()) > step)
    assert jobs.get(job.id).state == "running"
    again = Served(root)
    try:
        page.goto(f"{again.address}/training?run=artifacts/brains/mixtral/long/metrics.jsonl")
        button(page, "Stop this run").click()
        page.locator(".dialog").get_by_role("button", name="Stop").click()
        expect(page.locator(".status")).to_contain_text("Asked it to save and stop.")
        assert wait_for(jobs, job.id, "stopped", "failed", "killed").state == "stopped"
        assert "saved. Continue with" in jobs.log(job.id)
        last = sorted((brain / "checkpoints").glob("step_*"))[-1]
        assert json.loads((last / "trainer.json").read_text())
        saved = int(last.name.removeprefix("step_"))

        expect(page.locator(".soft", has_text="stopped")).to_be_visible()
        button(page, "Resume this run").click()
        expect(page.locator(".panel .command")).to_contain_text(f"aios train --name=long --resume --root={root}")
        done = page.get_by_text(re.compile("step [0-9,]+ of 100,000"))
        expect(done).to_be_visible(timeout=60_000)
        # It begins at the step that was saved, and goes on.
        wait_until(lambda: int(re.search("step ([0-9,]+)", done.text_content())[1].replace(",", "")) > saved)
        button(page, "Stop").click()  # from its own page
        page.locator(".dialog").get_by_role("button", name="Stop").click()
        expect(page.locator(".mark")).to_have_text("stopped", timeout=60_000)
        expect(page.locator(".log")).to_contain_text("--resume")
        page.goto("about:blank")
    finally:
        again.stop()


def test_train_a_hierarchical_brain(page, root):
    page.goto("/training/new")
    button(page, "HRM ACTv1").click()
    page.get_by_label("Text, a path in this workspace").fill("../texts")
    page.get_by_label("Name of the brain").fill("deep")
    button(page, "Show the plan").click()
    wrong = page.locator("section .wrong")
    expect(wrong).to_contain_text("is not in this workspace")
    page.get_by_label("Text, a path in this workspace").fill("training_data/oratory")
    form(page, steps="4", batch_size="2", max_seq_len="32")
    choose(page, "Size", "tiny")
    form(page, hidden_size="30")
    button(page, "Show the plan").click()
    expect(wrong).to_contain_text("hidden_size is 30, not a multiple of 4 attention heads", timeout=60_000)
    form(page, hidden_size="32")
    button(page, "Show the plan").click()
    expect(page.get_by_role("region", name="Plan")).to_contain_text("1 high and 1 low blocks", timeout=60_000)
    button(page, "Start training").click()
    expect(page.locator(".mark")).to_have_text("done", timeout=90_000)
    expect(page.get_by_text("step 4 of 4")).to_be_visible()
    assert (root / "artifacts/brains/actv1/deep/model.safetensors").is_file()


def test_a_run_of_another_terminal_is_stopped_by_its_stop_file(page, root):
    brain = root / "artifacts/brains/mixtral/small"
    metrics = brain / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["event"] != "final"]
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    expect(page.locator(".soft", has_text="step 40")).to_be_visible()
    expect(button(page, "Resume this run")).to_be_hidden()  # it is finished
    metrics.write_text("\n".join(lines) + "\n")
    expect(page.locator(".soft", has_text="running")).to_be_visible()
    expect(button(page, "Stop this run")).to_be_hidden()  # not within reach
    run = json.loads((brain / "run.json").read_text())
    run["training"]["stop_file"] = str(root / "STOP")
    (brain / "run.json").write_text(json.dumps(run))
    button(page, "Stop this run").click()
    page.locator(".dialog").get_by_role("button", name="Stop").click()
    expect(page.locator(".status")).to_contain_text("Asked it to save and stop.")
    assert (root / "STOP").read_bytes() == b""


def test_goals_of_a_brains_own_experts(page, root):
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    place = page.get_by_label("Layer and expert, as 2.5 or *.5")
    for slot, said in (("x", "'mixtral/small:x' is no slot"), ("7.1", "has no layer 7"), ("0.9", "has no expert 9")):
        place.fill(slot)
        choose(page, "Goal", "Know licences")
        button(page, "Link").click()
        says(page, said)
        expect(page.locator(".status .wrong")).to_be_visible()
    place.fill("*.2")
    choose(page, "Goal", "Know licences")
    button(page, "Link").click()
    says(page, "Goal 1 is linked to laws, mixtral/small:*.2.", "aios goals link-expert 1 'mixtral/small:*.2'")
    assert "mixtral/small:*.2" in Goals(root).get(1).experts
    button(page, "Unlink goal 1 from mixtral/small:*.2").click()
    says(page, "Goal 1 is linked to laws.", "aios goals unlink-expert 1 'mixtral/small:*.2'")
    assert "mixtral/small:*.2" not in Goals(root).get(1).experts


def test_compare_two_runs(page, root):
    page.goto("/training")
    choose(page, "Run", "brains/mixtral/small")
    expect(page.locator(".soft", has_text="step 40")).to_be_visible()
    for name in (*charts.LINES.values(), *charts.HEAT.values()):
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    choose(page, "Compare with", "experts/laws")
    expect(page).to_have_url(re.compile("other=artifacts%2Fexperts%2Flaws%2Fmetrics.jsonl"))
    expect(page.locator("canvas").first).to_be_visible()


def drawn(page, label):
    """The options of a chart as the browser has them."""
    chart = page.locator(f'[aria-label="{label}"]')
    expect(chart.locator("canvas").first).to_be_visible()
    return chart.evaluate("(one) => getElement(Number(one.id.slice(1))).chart.getOption()")


def test_charts_show_what_the_file_holds_and_follow_it(page, root):
    log = root / "artifacts/brains/mixtral/small/metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    trained = [one for one in records if one["event"] == "train"]
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    (loss,) = drawn(page, charts.LINES["loss"])["series"]
    assert loss["data"] == [[one["step"], one["lm_loss"]] for one in trained]
    control = {one["name"]: one["data"] for one in drawn(page, charts.LINES["control"])["series"]}
    assert control["R"] == [[one["step"], one["R"]] for one in trained]
    (load,) = drawn(page, charts.HEAT["load"])["series"]
    width = len(trained[0]["load"][0])
    assert load["data"] == [
        [column, expert, pytest.approx(one["load"][0][expert] * width, abs=1e-3)]
        for column, one in enumerate(trained)
        for expert in range(width)
    ]
    choose(page, "Layer", "1")
    last = [0, 0, pytest.approx(trained[0]["load"][1][0] * width, abs=1e-3)]
    wait_until(lambda: drawn(page, charts.HEAT["load"])["series"][0]["data"][0] == last)
    added = {**trained[-1], "step": 99, "lm_loss": 1.25}
    with log.open("a") as file:
        file.write(json.dumps(added) + "\n")
    wait_until(lambda: drawn(page, charts.LINES["loss"])["series"][0]["data"][-1] == [99, 1.25])
    expect(page.locator(".soft", has_text="step 99")).to_be_visible()


def test_charts_of_a_long_run_wait_while_its_words_go_on(page, root):
    log = root / "artifacts/brains/mixtral/small/metrics.jsonl"
    last = next(one for one in map(json.loads, reversed(log.read_text().splitlines())) if one["event"] == "train")
    log.write_text("".join(json.dumps({**last, "step": step}) + "\n" for step in range(1, 400)))
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    end = lambda: drawn(page, charts.LINES["loss"])["series"][0]["data"][-1][0]  # noqa: E731
    assert end() == 399
    with log.open("a") as file:
        file.write(json.dumps({**last, "step": 400}) + "\n")
    expect(page.locator(".soft", has_text="step 400")).to_be_visible()
    assert end() == 399
    wait_until(lambda: end() == 400)


def test_cancelling_the_training_of_an_expert_leaves_nothing_half_made(page, root):
    page.goto("/jobs")
    page.get_by_label("Id of the expert").fill("verse")
    page.get_by_label("Text of the domain").fill("training_data/oratory")
    small = {"steps": "100000", "batch size": "2", "max seq len": "32", "eval tokens": "300"}
    for name, value in small.items():
        page.get_by_label(name, exact=True).fill(value)
    button(page, "Train").click()
    expect(page.get_by_text(re.compile("step [0-9,]+ of 100,000"))).to_be_visible(timeout=90_000)
    button(page, "Stop").click()
    page.locator(".dialog").get_by_role("button", name="Stop").click()
    expect(page.locator(".mark")).to_have_text("stopped", timeout=60_000)
    expect(button(page, "Stop")).to_be_hidden()
    expect(page.locator(".log")).not_to_contain_text("Traceback")
    assert not list(root.glob("artifacts/experts/verse/*.safetensors"))
    registry = Registry(root)
    assert all(one.expert_id != "verse" or one.version == 0 for one in registry.entries())
    assert registry.get("laws").version == 1


def test_a_run_that_is_none(page):
    page.goto("/training?run=../../../etc/passwd")
    expect(page.get_by_text("There is no run '../../../etc/passwd'")).to_be_visible()


def test_a_run_that_has_written_nothing_yet_is_awaited_and_no_other_is_shown(page, root):
    late = root / "artifacts/brains/mixtral/late/metrics.jsonl"
    page.goto("/training?run=artifacts/brains/mixtral/late/metrics.jsonl")
    expect(page.get_by_text("or it has written nothing yet")).to_be_visible()
    expect(page.locator("canvas")).to_have_count(0)
    expect(button(page, "Stop this run")).to_have_count(0)
    late.parent.mkdir()
    shutil.copy(root / "artifacts/brains/mixtral/small/metrics.jsonl", late)
    expect(page.locator(".soft", has_text="step 40")).to_be_visible()
    expect(page.locator(".q-select").first).to_contain_text("late")


def test_words_and_lists_follow_a_run_and_name_whom_health_masks(page, root):
    log = root / "artifacts/brains/mixtral/small/metrics.jsonl"
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    words = page.locator(".soft", has_text="step 40")
    expect(words).to_contain_text("finished")
    last = [one for one in map(json.loads, log.read_text().splitlines()) if one["event"] == "train"][-1]
    with log.open("a") as file:
        file.write(json.dumps(last | {"step": 45, "masked_experts": [[1, 2]]}) + "\n")
    expect(page.locator(".soft", has_text="step 45")).to_contain_text("health masks expert 2 of layer 1, running")
    expect(page.locator(".q-select").first).to_contain_text("step 45")


def test_charts_that_lag_say_so(page, root):
    log = root / "artifacts/brains/mixtral/small/metrics.jsonl"
    last = [one for one in map(json.loads, log.read_text().splitlines()) if one["event"] == "train"][-1]
    log.write_text("".join(json.dumps(last | {"step": step}) + "\n" for step in range(1, 121)))
    page.goto("/training?run=artifacts/brains/mixtral/small/metrics.jsonl")
    expect(page.locator(".soft", has_text="step 120")).not_to_contain_text("charts")
    with log.open("a") as file:
        file.write(json.dumps(last | {"step": 121}) + "\n")
    expect(page.locator(".soft", has_text="step 121")).to_contain_text("charts up to step 120")
    expect(page.locator(".soft", has_text="step 121")).not_to_contain_text("charts")


def test_a_number_beyond_all_use_is_refused(page):
    page.goto("/training/new")
    page.get_by_label("Name of the brain").fill("long")
    form(page, max_steps="1e30")
    button(page, "Show the plan").click()
    expect(page.locator("section .wrong")).to_contain_text("max steps is 1e+30; use a smaller number.")


def test_what_was_told_can_be_closed(page):
    page.goto("/routing")
    button(page, "Inspect").click()
    expect(page.locator(".status")).to_be_visible()
    button(page, "Close the status bar").click()
    expect(page.locator(".status")).to_be_hidden()
    button(page, "Inspect").click()
    expect(page.locator(".status")).to_be_visible()


def test_empty_workspace_says_what_to_do_first(page, root):
    shutil.rmtree(root / "artifacts")
    for place, words in (
        ("/", "No expert yet"),
        ("/goals", "No goal yet"),
        ("/training", "No run yet"),
        ("/jobs", "No job yet"),
    ):
        page.goto(place)
        expect(page.get_by_text(words)).to_be_visible()
    assert not (root / "artifacts").exists()
