"""Runs, followed while they grow."""

import itertools
import json
import os
import tracemalloc

import pytest

from aios.brains.metrics import History, read_metrics
from aios.manager import charts
from aios.manager.runs import POINTS, RunLog, Runs
from chronomoe.errors import ConfigError


def step(number, **more):
    record = {"event": "train", "step": number, "loss": 9.0, "lm_loss": 7 - number / 1000, "lr": 1e-3, "kappa": 0.1}
    record |= {"lb_loss": 1.5, "valleys": [0], "ridges": [], "dead_experts": number % 2}
    record |= {"R": 0.5, "gate": 1.0, "load": [[0.5, 0.5], [0.25, 0.75]], "T_bar": [[1.0, 1.1], [0.9, 1.0]]}
    return json.dumps(record | more) + "\n"


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "artifacts/brains/mixtral/small/metrics.jsonl"
    file.parent.mkdir(parents=True)
    return file


def add(file, *lines):
    with file.open("a") as out:
        out.writelines(lines)


def test_only_what_was_added_is_read(file):
    add(file, step(1), step(2))
    log = RunLog(file)
    assert log.poll()
    assert log.line("lm_loss") == [[1, 6.999], [2, 6.998]]
    before = log.offset
    assert not log.poll()
    add(file, step(3))
    assert log.poll()
    assert [point[0] for point in log.line("lr")] == [1, 2, 3]
    assert log.offset == before + len(step(3))


def test_a_line_that_is_half_written_waits_for_the_rest(file):
    add(file, step(1), step(2)[:40])
    log = RunLog(file)
    log.poll()
    assert len(log.train.records) == 1
    add(file, step(2)[40:])
    log.poll()
    assert [one["step"] for one in log.train.records] == [1, 2]


def test_a_run_continued_from_an_earlier_step_replaces_what_it_had_done(file):
    lines = [step(1), step(2), step(3), json.dumps({"event": "resumed", "step": 1}) + "\n", step(2, lm_loss=1.0)]
    log = RunLog(file)
    for line in lines:
        add(file, line)
        log.poll()
    assert log.line("lm_loss") == [[1, 6.999], [2, 1.0]]
    assert [one["step"] for one in read_metrics(file)] == [1, 2]


def test_a_file_that_was_replaced_is_read_from_its_beginning(file):
    add(file, *(step(n) for n in range(9)))
    log = RunLog(file)
    log.poll()
    other = file.with_suffix(".new")
    other.write_text(step(5) * 1)
    os.replace(other, file)
    log.poll()
    assert [one["step"] for one in log.train.records] == [5]
    file.write_text("")
    log.poll()
    assert log.train.records == []
    file.unlink()
    assert not log.poll()


def test_memory_stays_flat_however_long_the_run(file):
    log = RunLog(file)
    sizes = []
    tracemalloc.start()
    for block in range(8):
        add(file, *(step(n) for n in range(block * 2000, block * 2000 + 2000)))
        log.poll()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(log.train.records) <= POINTS
    steps = [one["step"] for one in log.train.records]
    assert {later - earlier for earlier, later in itertools.pairwise(steps)} == {log.train.stride}
    assert max(sizes[1:]) < 1.5 * sizes[0]


def test_thinning_keeps_the_beginning_and_goes_to_the_end():
    history = History("train", limit=10)
    for number in range(1000):
        history.take({"event": "train", "step": number})
    steps = [one["step"] for one in history.records]
    assert steps[0] == 0
    assert steps[-1] >= 1000 - history.stride
    assert len(steps) <= 10


def test_lines_that_are_no_records_are_passed_over(file):
    add(file, "\n", "null\n", "[1]\n", '{"event": "train"}\n', '{"event": "train", "step": "x"}\n', "{\n", step(1))
    log = RunLog(file)
    log.poll()
    assert len(log.train.records) == 1


def test_runs_are_found_and_nothing_else_is_opened(tmp_path, file):
    add(file, step(7))
    outside = tmp_path.parent / "outside.jsonl"
    outside.write_text(step(1))
    (file.parent / "other.jsonl").symlink_to(outside)
    expert = tmp_path / "artifacts/experts/laws/metrics.jsonl"
    expert.parent.mkdir(parents=True)
    expert.write_text(step(3))
    hidden = tmp_path / "artifacts/experts/.aside-1/metrics.jsonl"
    hidden.parent.mkdir(parents=True)
    hidden.write_text(step(3))
    (expert.parent / "texts.jsonl").write_text('{"text": "no run"}\n')
    runs = Runs(tmp_path)
    assert {(one.name, one.step) for one in runs.all()} == {("brains/mixtral/small", 7), ("experts/laws", 3)}
    assert runs.follow("artifacts/brains/mixtral/small/metrics.jsonl").last["step"] == 7
    for odd in ("../outside.jsonl", "/etc/passwd", "artifacts/brains/mixtral/small/other.jsonl", ""):
        with pytest.raises(ConfigError, match="no run"):
            runs.follow(odd)
    outside.unlink()


def test_a_run_that_was_deleted_is_followed_no_more(tmp_path, file):
    runs, path = Runs(tmp_path), "artifacts/brains/mixtral/small/metrics.jsonl"
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"event": "train", "step": 7}\n')
    assert runs.follow(path).last["step"] == 7
    file.unlink()
    with pytest.raises(ConfigError, match="there is no run"):
        runs.follow(path)


def test_a_line_too_long_to_be_ours_is_passed_over(file):
    add(file, step(1))
    with file.open("a") as out:
        out.write("x" * 9_000_000 + "\n")
    add(file, step(2))
    log = RunLog(file)
    log.poll()
    assert [one["step"] for one in log.train.records] == [1, 2]


def test_a_new_file_may_have_the_number_of_the_old_one(file):
    add(file, *(step(n, lm_loss=5.0) for n in range(1, 11)))
    log = RunLog(file)
    log.poll()
    number = file.stat().st_ino
    file.write_text("")  # the number stays, as it often does when a file is removed and another made
    add(file, *(step(n, lm_loss=9.25) for n in range(1, 16)))
    assert file.stat().st_ino == number
    assert log.poll()
    assert log.line("lm_loss") == [[n, 9.25] for n in range(1, 16)]


def test_charts_of_one_run_and_of_two(file):
    add(file, step(1), step(2), json.dumps({"event": "eval", "step": 2, "<b>python": 2.5, "mean": 2.5}) + "\n")
    log = RunLog(file)
    log.poll()
    one = charts.lines("bits", [("a", log)])
    assert [line["name"] for line in one["series"]] == ["<b>python"]
    assert one["tooltip"]["renderMode"] == "richText"
    assert [line["name"] for line in charts.lines("control", [("a", log)])["series"]] == ["kappa", "R", "gate"]
    assert charts.lines("lb_loss", [("a", log)])["series"][0]["data"] == [[1, 1.5], [2, 1.5]]
    landscape = {line["name"]: line["data"] for line in charts.lines("landscape", [("a", log)])["series"]}
    assert landscape == {"valleys": [[1, 1], [2, 1]], "ridges": [[1, 0], [2, 0]], "dead experts": [[1, 1], [2, 0]]}
    two = charts.lines("loss", [("a", log), ("b", log)])
    assert len({line["itemStyle"]["color"] for line in two["series"]}) == 2
    assert len({line["lineStyle"]["type"] for line in two["series"]}) == 2
    assert [row["data"] for row in two["legend"]] == [["a: training"], ["b: training"]]
    assert len({row["top"] for row in two["legend"]}) == 2
    assert charts.lines("tokens_per_second", [("a", log)]) is None
    heat = charts.heat("load", log, 1)
    assert heat["series"][0]["data"] == [[0, 0, 0.5], [0, 1, 1.5], [1, 0, 0.5], [1, 1, 1.5]]
    assert charts.heat("load", log, 5) is None
    assert log.layers("T_bar") == 2


def test_many_counts_are_drawn_as_means(file):
    add(file, *(step(n, dead_experts=n % 2) for n in range(1, 481)))
    log = RunLog(file)
    log.poll()
    line = charts.lines("landscape", [("a", log)])["series"][2]["data"]
    assert len(line) == 60
    assert line[0] == [8, 0.5]
    assert line[-1] == [480, 0.5]


def test_whom_health_masks_is_the_latest_word(file):
    log = RunLog(file)
    for masked, found in (([[1, 2], [0, 3]], [[1, 2], [0, 3]]), ("x", []), ([[1], [2, 3]], [[2, 3]]), (None, [])):
        add(file, step(1, masked_experts=masked))
        log.poll()
        assert log.masked == found


def test_records_that_cannot_be_drawn_are_passed_over(file):
    add(file, step(1), "[" * 100_000 + "\n")
    for odd in ({"step": 10**30}, {"step": True}, {"step": -1}):
        add(file, json.dumps({"event": "train", "loss": 1.0} | odd) + "\n")
    add(file, step(2, lm_loss=10**40, load=[1, 2, 3], T_bar=[[{}, {}]]), step(3, load=[[0.5, None]]))
    log = RunLog(file)
    log.poll()
    assert [one["step"] for one in log.train.records] == [1, 2, 3]
    assert 2 not in [at for at, _ in log.line("lm_loss")]
    assert log.columns("load", 0)[0][-1] == 3
    assert 2 not in log.columns("load", 0)[0]
    assert charts.heat("load", log, 0) is not None
    assert charts.heat("T_bar", log, 0)["xAxis"]["data"] == [1, 3]


def test_a_longer_file_in_its_place_is_read_from_its_beginning(file):
    add(file, *(step(n) for n in range(3)))
    log = RunLog(file)
    log.poll()
    other = file.with_suffix(".new")
    other.write_text("".join(step(n) for n in range(100, 120)))
    os.replace(other, file)
    log.poll()
    assert [one["step"] for one in log.train.records] == list(range(100, 120))


def test_a_run_that_ended_is_not_live_and_few_logs_are_kept(tmp_path):
    runs = Runs(tmp_path)
    for number in range(9):
        home = tmp_path / f"artifacts/brains/mixtral/b{number}"
        home.mkdir(parents=True)
        (home / "metrics.jsonl").write_text(step(1))
        assert runs.follow(f"artifacts/brains/mixtral/b{number}/metrics.jsonl").live
    assert len(runs._logs) == 6
    add(home / "metrics.jsonl", json.dumps({"event": "final", "step": 1, "trained": True}) + "\n")
    assert not runs.follow("artifacts/brains/mixtral/b8/metrics.jsonl").live


def test_each_curve_is_of_its_own_run(file):
    other = file.with_name("other.jsonl")
    add(file, step(1, lm_loss=5.0), step(2, lm_loss=4.0))
    add(other, step(1, lm_loss=9.0), step(2, lm_loss=8.0))
    logs = [RunLog(file), RunLog(other)]
    for log in logs:
        log.poll()
    drawn = charts.lines("loss", [("a", logs[0]), ("b", logs[1])])["series"]
    assert [line["data"] for line in drawn] == [[[1, 5.0], [2, 4.0]], [[1, 9.0], [2, 8.0]]]
