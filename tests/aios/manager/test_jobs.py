"""Jobs: processes that outlive who started them, found again and stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from aios.manager.jobs import Jobs, birth_of
from chronomoe.errors import ConfigError


def wait(jobs, job_id, *states, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = jobs.get(job_id)
        if job.state in states:
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job.state}, not {states}: {jobs.log(job_id)}")


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path)
    yield jobs
    for child in jobs._children:
        child.wait(60)


def left_by(jobs, *, pid, birth, job_id="20260101-000000-job-0", **more):
    """The files of a job of an earlier time."""
    folder = jobs.home / job_id
    folder.mkdir(parents=True)
    asked = {"title": "t", "words": ["doctor"], "created": time.time() - 3600} | more
    (folder / "job.json").write_text(json.dumps(asked))
    if pid is not None:
        (folder / "process.json").write_text(json.dumps({"pid": pid, "birth": birth}))
    return job_id


def test_nothing_is_made_by_looking(jobs, tmp_path):
    assert jobs.all() == []
    assert not any(tmp_path.iterdir())
    for odd in ("../../etc", "x", "", "20260101-000000-job-0", "20260101-000000-job-0/.."):
        with pytest.raises(ConfigError, match="no job"):
            jobs.get(odd)


def test_a_job_runs_apart_and_another_process_finds_how_it_ended(jobs, tmp_path):
    job = jobs.start("List", ["experts", "list", "--root", str(tmp_path)], kind="list")
    assert job.state == "starting"
    assert job.command == f"aios experts list --root {tmp_path}"
    done = wait(Jobs(tmp_path), job.id, "done")
    assert done.code == 0
    assert "No expert yet" in jobs.log(job.id)
    assert done.ended >= done.created
    assert [one.id for one in jobs.all()] == [job.id]
    with pytest.raises(ConfigError, match="not running"):
        jobs.cancel(job.id)


def test_a_job_that_fails_says_so_in_the_commands_sentence(jobs, tmp_path):
    job = jobs.start("Show", ["experts", "show", "ghost", "--root", str(tmp_path)])
    assert wait(jobs, job.id, "failed").code == 2
    assert "aios: there is no expert 'ghost'" in jobs.log(job.id)


def test_stopping_a_job_that_was_started_deaf_to_ctrl_c(jobs, tmp_path):
    held = tmp_path / "artifacts/experts/registry.json.lock"
    held.parent.mkdir(parents=True)
    from filelock import FileLock

    with FileLock(held):  # the job waits for it
        deaf = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            job = jobs.start("Create", ["experts", "create", "x", "--root", str(tmp_path)])
        finally:
            signal.signal(signal.SIGINT, deaf)
        wait(jobs, job.id, "running")
        time.sleep(1)
        other = Jobs(tmp_path)
        assert os.getsid(other.get(job.id).pid) != os.getsid(0)
        other.cancel(job.id)
        assert wait(other, job.id, "stopped").code == 130


def test_a_pid_that_belongs_to_somebody_else_now_is_not_taken_for_the_job(jobs):
    job_id = left_by(jobs, pid=os.getpid(), birth="another boot:12345")
    assert jobs.get(job_id).state == "killed"
    with pytest.raises(ConfigError, match="not running"):
        jobs.cancel(job_id)


def test_a_job_that_was_killed(jobs):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    job_id = left_by(jobs, pid=child.pid, birth=birth_of(child.pid), metrics="artifacts/x.jsonl")
    assert jobs.get(job_id).state == "running"
    assert jobs.of_run("artifacts/x.jsonl").id == job_id
    child.kill()
    deadline = time.monotonic() + 10
    while birth_of(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert jobs.get(job_id).state == "killed"  # a zombie counts as ended
    child.wait()
    assert jobs.get(job_id).state == "killed"
    assert jobs.of_run("artifacts/x.jsonl") is None


def test_a_job_that_never_came_up_and_folders_that_are_none(jobs):
    left_by(jobs, pid=None, birth=None)
    (jobs.home / "20260101-000001-job-0").mkdir()
    (jobs.home / "notes").mkdir()
    assert [job.state for job in jobs.all()] == ["killed"]


def test_only_the_end_of_a_long_log_is_read(jobs):
    job_id = left_by(jobs, pid=None, birth=None)
    (jobs.home / job_id / "log").write_bytes(b"x" * 100_000 + b"end")
    assert len(jobs.log(job_id)) == 20_000
    assert jobs.log(job_id, 5) == "xxend"


def test_a_second_stop_is_not_sent(jobs, tmp_path):
    code = (
        "import signal, sys, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "open(sys.argv[1], 'w').close()\n"
        "time.sleep(2)\n"
        "open(sys.argv[1], 'w').write(str(len(seen)))\n"
    )
    ready = tmp_path / "ready"
    child = subprocess.Popen([sys.executable, "-c", code, str(ready)])
    while not ready.exists():
        time.sleep(0.01)
    job_id = left_by(jobs, pid=child.pid, birth=birth_of(child.pid))
    for _ in range(3):  # the second Ctrl-C would be the deadly one
        Jobs(tmp_path).cancel(job_id)
        time.sleep(0.2)
    child.wait()
    assert ready.read_text() == "1"


def test_another_boot_has_other_processes(jobs):
    boot, _, ticks = birth_of(os.getpid()).partition(":")
    assert jobs.get(left_by(jobs, pid=os.getpid(), birth=f"{boot}:{ticks}")).state == "running"
    elsewhere = left_by(jobs, pid=os.getpid(), birth=f"other:{ticks}", job_id="20260101-000002-job-0")
    assert jobs.get(elsewhere).state == "killed"


def test_what_lies_outside_is_no_job_nor_what_was_made_at_no_time(jobs, tmp_path):
    job_id = left_by(jobs, pid=None, birth=None)
    os.rename(jobs.home / job_id, jobs.home.parent / job_id)
    with pytest.raises(ConfigError, match="there is no job"):
        jobs.get(f"../{job_id}")
    again = left_by(jobs, pid=None, birth=None)
    asked = json.loads((jobs.home / again / "job.json").read_text())
    (jobs.home / again / "job.json").write_text(json.dumps(asked | {"created": 1e30}))
    assert jobs.all() == []
