"""Jobs and the curves of runs."""

import json
import re
import shutil
import signal
import time

from playwright.sync_api import expect

from aios.experts.registry import Registry
from aios.manager import charts
from aios.manager.jobs import Jobs
from tests.web.conftest import Served
from tests.web.steps import button, choose


def wait_for(jobs, job_id, *states):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if jobs.get(job_id).state in states:
            return jobs.get(job_id)
        time.sleep(0.1)
    raise AssertionError(jobs.log(job_id))


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
    command = f"aios experts train verse --brain=mixtral/small --dataset-file={root}/training_data/oratory --steps=8"
    expect(page.locator("#train .command")).to_contain_text(command)
    button(page, "Train").click()
    expect(page).to_have_url(re.compile("/jobs/[0-9-]+-expert-0$"))
    expect(page.locator(".mark")).to_have_text("done", timeout=120_000)
    expect(page.locator(".log")).to_contain_text("Next: aios experts attach verse")
    expect(page.get_by_text("step 8 of 8")).to_be_visible()
    entry = Registry(root).get("verse")
    assert (entry.version, entry.goals) == (1, ("Speak well",))
    page.goto("/jobs")
    expect(page.get_by_role("link", name="Train verse")).to_be_visible()


def test_a_run_outlives_the_manager_and_is_stopped_safely(page, root, served):
    jobs = Jobs(root)
    brain = root / "artifacts/brains/mixtral/long"
    words = [
        "train",
        "--name",
        "long",
        "--hidden-dim",
        "32",
        "--num-layers",
        "1",
        "--seq-len",
        "32",
        "--batch-size",
        "2",
    ]
    words += ["--max-steps", "100000", "--log-every-n-steps", "5", "--eval-every-n-steps", "1000", "--root", str(root)]
    metrics = "artifacts/brains/mixtral/long/metrics.jsonl"
    job = jobs.start("Train long", words, kind="brain", metrics=metrics)
    deadline = time.monotonic() + 90
    while not list(brain.glob("metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)

    page.goto(f"/training?run={metrics}")
    state = page.locator(".soft", has_text="running")
    expect(state).to_be_visible()
    expect(page.locator("canvas").first).to_be_visible()
    before = state.text_content()
    expect(state).not_to_have_text(before)  # it follows

    served.stop(signal.SIGKILL)
    page.goto("about:blank")
    time.sleep(1)
    assert jobs.get(job.id).state == "running"
    again = Served(root)
    try:
        page.goto(f"{again.address}/training?run={metrics}")
        button(page, "Stop this run").click()
        page.locator(".dialog").get_by_role("button", name="Stop").click()
        expect(page.locator(".told")).to_contain_text("Asked it to save and stop.")
        assert wait_for(jobs, job.id, "stopped", "failed", "killed").state == "stopped"
        assert "saved. Continue with" in jobs.log(job.id)
        last = sorted((brain / "checkpoints").glob("step_*"))[-1]
        assert json.loads((last / "trainer.json").read_text())
        jobs._children[0].wait(60)
        page.goto("about:blank")
    finally:
        again.stop()


def test_stop_a_job_from_its_page(page, root):
    words = [
        "train",
        "--name",
        "long",
        "--hidden-dim",
        "32",
        "--num-layers",
        "1",
        "--seq-len",
        "32",
        "--batch-size",
        "2",
    ]
    jobs = Jobs(root)
    job = jobs.start("Train long", [*words, "--max-steps", "100000", "--root", str(root)], kind="brain")
    page.goto(f"/jobs/{job.id}")
    expect(page.locator(".log")).to_contain_text("Step", timeout=60_000)
    button(page, "Stop").click()
    page.locator(".dialog").get_by_role("button", name="Stop").click()
    expect(page.locator(".mark")).to_have_text("stopped", timeout=60_000)
    expect(page.locator(".log")).to_contain_text("--resume")
    jobs._children[0].wait(60)


def test_compare_two_runs(page, root):
    page.goto("/training")
    choose(page, "Run", "brains/mixtral/small")
    expect(page.get_by_text("step 40")).to_be_visible()
    for name in (*charts.LINES.values(), *charts.HEAT.values()):
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    choose(page, "Compare with", "experts/laws")
    expect(page).to_have_url(re.compile("other=artifacts%2Fexperts%2Flaws%2Fmetrics.jsonl"))
    expect(page.locator("canvas").first).to_be_visible()


def test_a_run_that_is_none(page):
    page.goto("/training?run=../../../etc/passwd")
    expect(page.get_by_text("There is no run '../../../etc/passwd'")).to_be_visible()


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
