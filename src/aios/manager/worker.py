"""The process that runs brains: one, with at most one brain loaded, begun when needed and ended when idle."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Lock
from typing import Any

from aios.sentence import sentence
from chronomoe.errors import ChronoMoEError

IDLE = 300.0
"""Seconds without a question after which the process ends, and with it the memory its brain takes."""


class Worker:
    """Asks that process; a question that finds it busy waits."""

    def __init__(self, root: Path, idle: float = IDLE) -> None:
        self.root, self.idle = root, idle
        self.process: BaseProcess | None = None
        self._link: Connection | None = None
        self._lock = Lock()
        self._ended = False
        self.threads = ThreadPoolExecutor(32, "worker")
        """Where questions wait, so that pages need not."""

    def ask(
        self,
        task: str,
        *given: Any,
        piece: Callable[[str], Any] = lambda _: None,
        stop: Event | None = None,
        **arguments: Any,
    ) -> Any:
        """What the method ``task`` of :class:`aios.manager.worker_process.Tasks` returns.

        ``piece`` gets text as it is made, ``stop`` ends that early. Raises :class:`ChronoMoEError` with the sentence
        of what failed there, or when the process died; the next question begins another.
        """
        with self._turn(stop):
            try:
                link = self._connected()
                link.send((task, given, arguments))
                while True:
                    kind, value = link.recv()
                    if kind == "done":
                        return value
                    if kind == "failed":
                        raise ChronoMoEError(value)
                    piece(value)
                    if stop is not None and stop.is_set():
                        link.send(None)
            except (EOFError, OSError):
                raise ChronoMoEError(f"{self._end()}; ask again and another begins.") from None

    @contextmanager
    def _turn(self, stop: Event | None) -> Iterator[None]:
        waits = True
        while waits:
            if stop is not None and stop.is_set():
                raise ChronoMoEError("stopped before it began.")
            waits = not self._lock.acquire(timeout=0.2)
        try:
            if self._ended:
                raise ChronoMoEError("the manager is ending.")
            yield
        finally:
            self._lock.release()

    def end(self) -> None:
        """End the process for good; questions that wait for it fail."""
        self._ended = True
        self.threads.shutdown(wait=False)
        if self.process is not None:
            self.process.terminate()

    def _connected(self) -> Connection:
        # Nothing is unread between two questions: what can be read then is the end of the process.
        if self._link is None or self._link.poll():
            context = multiprocessing.get_context("spawn")
            self._link, theirs = context.Pipe()
            # A daemon: it ends with the manager. Killed without a word, the manager leaves it a broken pipe.
            self.process = context.Process(target=_serve, args=(theirs, self.root, self.idle), daemon=True)
            self.process.start()
            theirs.close()
        return self._link

    def _end(self) -> str:
        process, self._link = self.process, None
        if process is None:
            return "the process that runs brains cannot be started"
        process.terminate()
        process.join(10)
        reason = " (it was killed, perhaps for want of memory)" if process.exitcode == -signal.SIGKILL else ""
        return f"the process that runs brains has ended{reason}"


def _serve(link: Connection, root: Path, idle: float) -> None:

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the manager

    def piece(text: str) -> bool:
        """Hand text over; False when no more is wanted."""
        link.send(("piece", text))
        wanted = not link.poll()
        return wanted or link.recv() is not None

    with suppress(EOFError, OSError):
        tasks = None
        while link.poll(idle):
            question = link.recv()
            if question is None:  # to stop what had just ended
                continue
            try:
                if tasks is None:
                    from aios.manager.worker_process import Tasks

                    tasks = Tasks(root, piece)
                task, given, arguments = question
                answer = "done", getattr(tasks, task)(*given, **arguments)
            except Exception as error:
                answer = "failed", sentence(error)
            link.send(answer)
