"""The process of one job: `python -m aios.manager.run_job FOLDER WORDS...` runs `aios WORDS...` and notes its end."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

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
        sys.argv = ["aios", *words]
        runpy.run_module("aios", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    finally:
        write_json(folder / "exit.json", {"code": code, "ended": time.time()})
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
