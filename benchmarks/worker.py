"""One training-step arm in a process of its own, for what a process can set only once: glibc's allocator.

The parent writes a line to the worker's stdin, the worker does one step and answers with its seconds; end of input ends
it. So the parent can drive two workers in turn. By hand:
``echo go | python -m benchmarks.worker ours '{"vocab": 32000}' 2`` (arm, fields of Shape, threads).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.arms import Shape, step_arm
from benchmarks.measure import seconds_of
from chronomoe.allocator import keep_freed_memory


@contextmanager
def worker(arm: str, shape: Shape, *, keep_memory: bool) -> Iterator[Callable[[], float]]:
    """The step arm ``arm`` in another process, its allocator as it comes or (``keep_memory``) as chronomoe sets it."""
    command = [sys.executable, "-m", "benchmarks.worker", arm, json.dumps(asdict(shape)), str(torch.get_num_threads())]
    environment = {**os.environ, "CHRONOMOE_KEEP_MEMORY": "1" if keep_memory else "0"}
    root, pipe = Path(__file__).resolve().parents[1], subprocess.PIPE
    with subprocess.Popen(command, cwd=root, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        answers = process.stdout
        assert answers is not None

        def clock() -> float:
            print("go", file=process.stdin, flush=True)
            answer = answers.readline()
            if not answer:
                raise RuntimeError(f"the worker of {arm!r} ended with exit code {process.wait()}; its error is above.")
            return float(answer)

        # Leaving the block closes the worker's input, which ends it, and waits for it.
        yield clock


def main() -> None:
    """Answer questions until there are no more."""
    arm, fields, threads = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing but answers may reach the parent
    torch.set_num_threads(int(threads))
    keep_freed_memory()  # refused by CHRONOMOE_KEEP_MEMORY=0
    step = step_arm(Shape(**json.loads(fields)), arm)
    for _ in sys.stdin:
        print(seconds_of(step), file=answers, flush=True)


if __name__ == "__main__":
    main()
