"""Measure the Subbrains Manager: ``python -m benchmarks.manager [--rounds N] [--minutes N] [--quick]``.

Its first page on a workspace of 200 experts and 50 runs, from the start of the process; what a page that follows a run
costs a step of it, and the machine; and its memory while a page is refreshed ten times as often as usual. Writes
benchmarks/results/<date>-manager.md and .json; ``--quick`` is a smoke test and writes nothing, unless ``--out`` says
where. Needs nicegui, playwright and chromium (or CHROMIUM=path). Leave the machine alone meanwhile.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from statistics import fmean, linear_regression, median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psutil
from playwright.sync_api import Browser, sync_playwright

from aios.cli import run as aios
from aios.manager import training_page
from aios.store.entry import ExpertEntry
from aios.store.experts import Registry
from aios.store.transaction import Store
from benchmarks.run import RESULTS, machine

FASTER = 10
"""How many times as often as usual the page is refreshed while its memory is watched."""
HOUR = 3600 / training_page.EVERY
"""Refreshes in an hour."""
RUN = "artifacts/brains/mixtral/long/metrics.jsonl"
Row = dict[str, Any]


@contextlib.contextmanager
def manager(root: Path, every: float = training_page.EVERY) -> Iterator[tuple[psutil.Process, str]]:
    """The manager on a workspace: its process and its address."""
    code = f"from aios.manager import training_page; training_page.EVERY = {every}; from aios.cli import main; main()"
    words = ["manager", "--no-open", "--port", "0", "--root", str(root)]
    with subprocess.Popen([sys.executable, "-uc", code, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[2].rstrip("/")
            place = urlsplit(address)
            while True:  # it is bound a moment before it listens
                with socket.socket() as link:
                    if not link.connect_ex((place.hostname, place.port)):
                        break
                time.sleep(0.01)
            yield psutil.Process(process.pid), address
        finally:
            process.terminate()


def first_page(browser: Browser, root: Path, rounds: int) -> Row:
    """Seconds from the start of the process to the list of experts on the screen."""
    seconds = []
    for _ in range(rounds + 1):  # the first one warms the disk up
        begun = time.perf_counter()
        with manager(root) as (_, address):
            page = browser.new_page()
            page.goto(address)
            page.get_by_role("link", name="expert0", exact=True).wait_for()
            seconds.append(time.perf_counter() - begun)
            page.close()
    return _row("first page from process start, 200 experts and 50 runs, s", seconds[1:], "at most 2.00", 2.0)


def live_chart(browser: Browser, root: Path, rounds: int, steps: int) -> tuple[Row, Row]:
    """How much longer a step takes while a page follows the run, and while it is asked for something else."""
    words = ["train", "--name", "long", "--max-steps", "1000000", "--log-every-n-steps", "1", "--seq-len", "128"]
    words += ["--eval-every-n-steps", "1000000", "--save-every-n-steps", "1000000", "--root", str(root)]
    log, command = root / RUN, [sys.executable, "-m", "aios", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as training, manager(root) as (_, address):
        try:
            while not log.exists() or log.read_bytes().count(b"\n") < 5:
                time.sleep(0.5)
                assert training.poll() is None, "the training has ended"
            page = browser.new_page()
            ratios, times = [], []
            for number in range(rounds):
                taken = {}
                for open_ in (True, False) if number % 2 else (False, True):
                    page.goto(f"{address}/training?run={RUN}" if open_ else "about:blank")
                    taken[open_] = _step_time(log, steps)
                ratios.append(taken[True] / taken[False])
                times.append(1000 * taken[False])
            page.close()
        finally:
            training.kill()
    name = "step with a page that follows it / without"
    return _row(name, ratios, "at most 1.02", 1.02), _row("step without a page, ms", times)


def processor(browser: Browser, root: Path, seconds: float) -> list[Row]:
    """Processor time that page and manager take of all cores while a long run grows, with the page and without.

    Other work on the machine hardly moves it, which a step's time does not survive. The difference is what a step that
    keeps all cores busy pays for the page if its threads share the loss; where each waits for the slowest, it pays up
    to as many times that as there are cores, which is the last row.
    """
    log = root / RUN
    record = json.loads([line for line in log.read_text().splitlines() if '"event": "train"' in line][-1])
    log.write_text("".join(json.dumps({**record, "step": step}) + "\n" for step in range(2000)))
    record["step"] = 1999
    shares: dict[bool, list[float]] = {True: [], False: []}
    with manager(root) as (process, address), log.open("a") as file:
        page = browser.new_page()
        for number in range(6):
            open_ = number % 2 == 1
            page.goto(f"{address}/training?run={RUN}" if open_ else "about:blank")
            page.wait_for_timeout(3000)
            begun, before = time.monotonic(), _processor_time(process)
            while (taken := time.monotonic() - begun) < seconds:
                record["step"] += 1
                file.write(json.dumps(record) + "\n")
                file.flush()
                page.wait_for_timeout(350)
            shares[open_].append((_processor_time(process) - before) / taken / (os.cpu_count() or 1))
        page.close()
    lost = [(with_ - without) * (os.cpu_count() or 1) for with_, without in zip(*shares.values(), strict=True)]
    return [
        _row("processor time of page and manager, share of all cores", shares[True]),
        _row("the same without a page", shares[False]),
        _row("the most that a step can lose to the page", lost, "at most 0.02", 0.02),
    ]


def _processor_time(manager: psutil.Process) -> float:
    """Seconds taken so far by the manager and the browser's processes."""
    total = 0.0
    for one in {manager, *(one for one in psutil.Process().children(recursive=True) if "chrom" in one.name())}:
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def memory(browser: Browser, root: Path, minutes: float) -> tuple[Row, Row]:
    """Megabytes of the manager, and what they grow by in an hour of refreshing; the run grows all the while."""
    log, told = root / RUN, []
    lines = [line for line in log.read_text().splitlines() if '"event": "train"' in line]
    record = json.loads(lines[-1])
    with manager(root, training_page.EVERY / FASTER) as (process, address), log.open("a") as file:
        page = browser.new_page()
        page.goto(f"{address}/training?run={RUN}")
        begun = time.monotonic()
        while (now := time.monotonic() - begun) < 60 * minutes:
            record["step"] += 1
            file.write(json.dumps(record) + "\n")
            file.flush()
            told.append((now, process.memory_info().rss / 2**20))
            page.wait_for_timeout(1000 * training_page.EVERY / FASTER)
        page.close()
    settled = [(now * FASTER / training_page.EVERY / HOUR, size) for now, size in told[len(told) // 3 :]]
    slope = linear_regression(*zip(*settled, strict=True)).slope
    size = _row("memory of the manager, MiB", [size for _, size in settled])
    return size, _row("its growth, MiB in an hour of refreshing", [slope], "at most 10.00", 10.0)


def _step_time(log: Path, steps: int) -> float:
    """Mean seconds of the steps to come, once the page is there or gone: what few of them wait for counts too."""
    time.sleep(3)
    records: list[Any] = []
    with log.open() as file:
        file.seek(0, os.SEEK_END)
        file.readline()  # what is left of one that was being written
        while len(records) < steps:
            if (line := file.readline()).endswith("\n"):
                records += [json.loads(line)] if '"event": "train"' in line else []
            else:
                file.seek(file.tell() - len(line.encode()))
                time.sleep(0.1)
    return fmean(8 * 128 / record["tokens_per_second"] for record in records)


def _row(figure: str, values: Sequence[float], goal: str = "", bound: float | None = None) -> Row:
    value, now = median(values), datetime.now().strftime("%H:%M")
    met = None if bound is None else value <= bound
    rest = {"goal": goal, "met": met, "load": round(os.getloadavg()[0], 2), "time_of_day": now}
    return {"figure": figure, "median": value, "least": min(values), "most": max(values), "values": len(values), **rest}


def _fill(root: Path) -> None:
    """200 experts and 50 runs."""
    aios(["init", "--root", str(root), "--max-bytes", "400000"])
    Registry(root).create("first")
    with Store(root).change() as tables:
        for number in range(200):
            parent = f"expert{number // 3 - 1}" if number > 5 else None
            tables.experts.add(ExpertEntry(expert_id=f"expert{number}", parent_expert_id=parent))
    record = {"event": "train", "loss": 5.0, "lm_loss": 5.0, "lr": 1e-3, "load": [[0.125] * 8] * 4}
    for number in range(50):
        place = root / f"artifacts/brains/mixtral/run{number}/metrics.jsonl"
        place.parent.mkdir(parents=True)
        place.write_text("".join(json.dumps(record | {"step": step}) + "\n" for step in range(2000)))


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    text = "| figure | median | range | values | goal | met | load |\n" + "|---" * 7 + "|\n"
    for row in rows:
        met = {None: "", True: "yes", False: "**no**"}[row["met"]]
        text += f"| {row['figure']} | {row['median']:.3f} | {row['least']:.3f} .. {row['most']:.3f} | {row['values']} "
        text += f"| {row['goal']} | {met} | {row['load']} |\n"
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.manager", description="Measure the manager.")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of what is timed (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="in each turn with and without a page (%(default)s)")
    parser.add_argument("--minutes", type=float, default=6, help="of watching the memory (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.minutes = 2, 5, 0.3
    with TemporaryDirectory() as home, sync_playwright() as play:
        place = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser, root = play.chromium.launch(executable_path=place, args=["--no-sandbox"]), Path(home) / "w"
        _fill(root)
        rows = [first_page(browser, root, options.rounds)]
        rows += live_chart(browser, root, options.rounds, options.steps)
        rows += processor(browser, root, 2 if options.quick else 60)
        rows += memory(browser, root, options.minutes)
        browser.close()
    refreshed = options.minutes * FASTER
    text = (
        "Load is the machine's, averaged over the minute before each row ended. A page was refreshed "
        f"{FASTER} times as often as usual for {options.minutes:g} min, as in {refreshed:g} min, and the growth of the "
        f"manager's memory extrapolated from the last two thirds to an hour.\n\n{table(rows)}"
    )
    print(f"\n{text}")
    if out := options.out or (None if options.quick else RESULTS):
        out.mkdir(parents=True, exist_ok=True)
        day, facts = date.today().isoformat(), machine()
        described = ", ".join(f"{name}: {value}" for name, value in facts.items())
        (out / f"{day}-manager.md").write_text(f"# The manager, {day}\n\n{described}\n\n{text}")
        answer = {"date": day, "machine": facts, "rows": rows}
        (out / f"{day}-manager.json").write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
