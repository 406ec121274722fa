"""Jobs: `aios` commands run beside the page, each in a process and session of its own.

artifacts/jobs/<id>/
    job.json      words of the command, its working folder, when it was started
    process.json  pid of the process and what tells it from a later one of the same pid; it writes this itself
    log           all it printed
    exit.json     its exit code and when; missing if it was killed

Nothing of a job lives in the page: another process, or the same one after a restart, finds all of it here.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from aios.sentence import sentence
from aios.workspace import Workspace
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import write_json

State = Literal["starting", "running", "done", "stopped", "failed", "killed"]
_ID = re.compile(r"\d{8}-\d{6}-[a-z]{1,12}-\d{1,3}")
_STOPPING = "stop-asked"
_STARTING = 60.0
"""Seconds a process may take to say who it is."""


@dataclass(frozen=True)
class Job:
    """One job as its files tell it."""

    id: str
    folder: Path
    title: str
    words: tuple[str, ...]
    created: float
    state: State
    pid: int | None = None
    code: int | None = None
    ended: float | None = None
    metrics: str = ""
    """The run's metrics, from the root of the workspace; empty for a job without."""

    @property
    def alive(self) -> bool:
        """Is it still at work?"""
        return self.state in ("starting", "running")

    @property
    def command(self) -> str:
        """What it runs, ready to paste."""
        return shlex.join(["aios", *self.words])


class Jobs:
    """The jobs of a workspace. Nothing is created by asking for them."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.home = Workspace(self.root).jobs
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, title: str, words: Sequence[str], *, kind: str = "job", metrics: str = "") -> Job:
        """Run ``aios <words>`` apart from this process; :class:`CheckpointError` when it cannot be started."""
        folder = self._new_folder(kind)
        job = {"title": title, "words": list(words), "cwd": os.getcwd(), "created": time.time(), "metrics": metrics}
        write_json(folder / "job.json", job)
        try:
            with (folder / "log").open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "aios.manager.run_job", str(folder), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the page's terminal is not meant for it
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
                )
        except OSError as error:
            write_json(folder / "exit.json", {"code": 1, "ended": time.time()})
            raise CheckpointError(f"the job could not be started: {error.strerror}.") from error
        self._children.append(child)
        return self.get(folder.name)

    def all(self) -> list[Job]:
        """Every job, the newest first; folders that are no job are left out."""
        self._reap()
        if not self.home.is_dir():
            return []
        names = sorted((one.name for one in self.home.iterdir() if _ID.fullmatch(one.name)), reverse=True)
        return [job for name in names if (job := self._read(name)) is not None]

    def get(self, job_id: str) -> Job:
        """One job; :class:`ConfigError` for an unknown id."""
        self._reap()
        job = self._read(job_id) if _ID.fullmatch(job_id) else None
        if job is None:
            raise ConfigError(f"there is no job {job_id!r}.")
        return job

    def cancel(self, job_id: str) -> Job:
        """Ask a job to end as Ctrl-C does: training saves and stops. :class:`ConfigError` if it has ended already."""
        job = self.get(job_id)
        deadline = time.monotonic() + 10
        while job.state == "starting" and time.monotonic() < deadline:
            time.sleep(0.1)
            job = self.get(job_id)
        if job.state != "running" or job.pid is None:
            raise ConfigError(f"job {job_id} is not running ({job.state}).")
        if (job.folder / _STOPPING).exists():
            return job  # a second Ctrl-C would end it without saving
        (job.folder / _STOPPING).touch()
        with suppress(ProcessLookupError):  # it ended just now
            os.kill(job.pid, signal.SIGINT)
        return self.get(job_id)

    def log(self, job_id: str, size: int = 20_000) -> str:
        """The last ``size`` bytes a job printed."""
        file = self.get(job_id).folder / "log"
        try:
            with file.open("rb") as lines:
                lines.seek(max(0, file.stat().st_size - size))
                return lines.read(size).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def of_run(self, metrics: str) -> Job | None:
        """The job at work on a run, if one is."""
        return next((job for job in self.all() if job.alive and job.metrics == metrics), None)

    def _new_folder(self, kind: str) -> Path:
        self.home.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        for number in range(1000):
            folder = self.home / f"{stamp}-{kind}-{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
        raise CheckpointError("too many jobs were started in this second; try again.")

    def _read(self, job_id: str) -> Job | None:
        folder = self.home / job_id
        record, process, end = (_json(folder / name) for name in ("job.json", "process.json", "exit.json"))
        try:
            job = Job(
                id=job_id,
                folder=folder,
                title=str(record["title"]),
                words=tuple(map(str, record["words"])),
                created=float(record["created"]),
                state="starting",
                pid=int(process["pid"]) if process else None,
                code=int(end["code"]) if end else None,
                ended=float(end["ended"]) if end else None,
                metrics=str(record.get("metrics", "")),
            )
            datetime.fromtimestamp(job.created, UTC)
        except (KeyError, TypeError, ValueError, OverflowError, OSError):
            return None
        state = _state(job, process)
        if state == "killed" and (end := _json(folder / "exit.json")):  # it ended between two readings
            job = replace(job, code=int(end["code"]), ended=float(end["ended"]))
            state = _state(job, process)
        return replace(job, state=state)

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]


def _state(job: Job, process: dict[str, Any]) -> State:
    if job.code is not None:
        return {0: "done", 130: "stopped"}.get(job.code, "failed")  # type: ignore[return-value]
    if job.pid is None:
        return "starting" if time.time() - job.created < _STARTING else "killed"
    return "running" if birth_of(job.pid) == process.get("birth") else "killed"


def dry_run(words: list[str]) -> str:
    """What a command that trains prints with --dry-run; :class:`ConfigError` with its sentence when it refuses."""
    done = subprocess.run(
        [sys.executable, "-m", "aios", *words, "--dry-run"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:  # killed, it says nothing
        raise ConfigError(done.stderr.rpartition("aios: ")[2].strip() or sentence(MemoryError()))
    return done.stdout.strip()


def birth_of(pid: int) -> str | None:
    """What tells a process from a later one of the same pid; None for one that has ended."""
    if sys.platform == "linux":
        try:
            # After the name, which may hold anything: state is the first field, start in clock ticks the twentieth.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
