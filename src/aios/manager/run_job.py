"""The process of one job: `python -m aios.manager.run_job FOLDER WORDS...` runs `aios WORDS...` and notes its end."""

import os
import signal
import sys
import time
from pathlib import Path

from aios.cli import run
from aios.manager.jobs import birth_of
from chronomoe.storage import write_json


def main(folder: Path, words: list[str]) -> int:
    """Run a command; returns its exit code, which is also in exit.json."""
    # A shell starts background processes deaf to Ctrl-C, and they pass that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 1
    try:
        write_json(folder / "process.json", {"pid": os.getpid(), "birth": birth_of(os.getpid())})
        code = run(words)
    except KeyboardInterrupt:
        code = 130
    finally:
        write_json(folder / "exit.json", {"code": code, "ended": time.time()})
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
