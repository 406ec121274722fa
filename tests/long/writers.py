"""Eight processes that change one workspace at once: registry.json ends as aios.db has it, and nothing said is lost.

    python -m tests.long.writers                         eight writers for a minute
    python -m tests.long.writers --writers 3 --seconds 2

Each writer creates, trains, renames, uses and deletes experts of its own, links goals to them and to shared ones, and
notes what was done once the calls have returned. A reader parses registry.json all the while. ``writers-result.json``
beside this script holds the last result.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aios.store.entry import ExpertEntry
from aios.store.experts import Registry
from aios.store.goals import Goals
from tests.long.kills import faults

RESULT = Path(__file__).with_name("writers-result.json")
SHARED = ("shared-0", "shared-1")


def write(root: Path, writer: int, until: float) -> None:
    """Change the workspace until a time; each line of the log names an expert and its goals, or that it is gone."""
    registry, goals, number = Registry(root), Goals(root), 0
    with (root / f"done-{writer}").open("a") as log:
        while time.time() < until:
            name, renamed = f"w{writer}-{number}", f"w{writer}-{number}-renamed"
            registry.create(name, goals=[f"goal of {name}"])
            registry.upsert(ExpertEntry(expert_id=name, checkpoint_path=f"artifacts/experts/{name}/expert.safetensors"))
            goals.add(f"goal of writer {writer}", expert=SHARED[number % 2])
            registry.record_use(SHARED[0], 1, 0.5)
            kept = name
            if number % 3 == 1:
                registry.rename(name, kept := renamed)
            if number % 3 == 2:
                registry.delete(name)
            log.write(json.dumps([kept, [f"goal of {name}"], number % 3 != 2]) + "\n")
            log.flush()
            os.fsync(log.fileno())
            number += 1


def run(root: Path, writers: int, seconds: float) -> dict[str, object]:
    """Let them write; how much was done, and what was wrong."""
    registry, reads = Registry(root), 0
    for name in SHARED:
        registry.create(name)
    until = time.time() + seconds
    command = [sys.executable, "-m", "tests.long.writers", "--root", str(root), "--until", str(until), "--writer"]
    running = [subprocess.Popen([*command, str(writer)]) for writer in range(writers)]
    while any(process.poll() is None for process in running):
        assert len(json.loads(registry.file.read_text())["experts"]) >= len(SHARED)
        reads += 1
        time.sleep(0.01)
    wrong = [f"writer {writer} failed" for writer, process in enumerate(running) if process.returncode]
    done = [json.loads(line) for file in sorted(root.glob("done-*")) for line in file.read_text().splitlines()]
    experts = {one.expert_id: one for one in registry.entries()}
    for name, texts, kept in done:
        if kept != (name in experts) or (kept and list(experts[name].goals) != texts):
            wrong.append(f"{name} was lost, came back or has other goals")
    if experts[SHARED[0]].total_activations < len(done):
        wrong.append("uses were lost")
    return {"writers": writers, "seconds": seconds, "rounds": len(done), "reads": reads, "wrong": wrong + faults(root)}


def main(words: list[str]) -> int:
    """Run the command; 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--writer", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.root is not None:
        write(given.root, given.writer, given.until)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), given.writers, given.seconds)
    if (given.writers, given.seconds) == (8, 60.0):
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return int(bool(result["wrong"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
