"""Build the wheel, install it without extras into an empty venv, and run the first commands: `make wheel`.

The venv knows nothing of the source tree: what is not in the wheel is missing here.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("aios/manager/page.css", "aios/py.typed", "chronomoe/py.typed", "aios/cli/__init__.py")
TORCH = "torch==2.13.0"
"""First and by itself, as in the Makefile: the CPU build where pip is set up for it."""


def main() -> int:
    """Exit code 0 when all went well; the first thing that fails ends it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv/bin/python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        constraint = ["--constraint", ROOT / "constraints.txt"]

        call(*pip[:-2], "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        missing = [name for name in FILES if name not in names]
        assert not missing, f"{wheel.name} lacks {missing}"
        assert not [name for name in names if name.startswith(("tests", "experiments", "benchmarks", "examples"))]

        call(*pip, *constraint, TORCH, cwd=folder)
        call(*pip, *constraint, wheel, cwd=folder)
        aios = folder / "venv/bin/aios"
        print(call(aios, "--version", cwd=folder).strip())
        assert "Commands" in call(aios, "--help", cwd=folder)
        try_demo(aios, folder)
    print(f"{wheel.name}: installs alone and runs.")
    return 0


def try_demo(aios: Path, folder: Path) -> None:
    """The first commands of `make demo`: a workspace, prepared text, a plan, a few steps, a sample."""
    (folder / "text").mkdir()
    for number in range(40):
        (folder / f"text/{number}.txt").write_text(f"Note {number}. " + "The sun rose over the small town. " * 20)
    model = folder / "artifacts/hf_implant/base_model"
    # Sample text is in the extra `demo`; without it a workspace begins with text of one's own.
    call(aios, "data", "prepare", "mine=text", "--out", "training_data/prepared", "--vocab-size", "300", cwd=folder)
    call(aios, "init", "--max-bytes", "60000", "--vocab-size", "300", cwd=folder)
    assert (model / "config.json").is_file(), f"{model} was not made"
    tiny = ["--hidden-dim", "16", "--num-layers", "1", "--num-experts", "4", "--seq-len", "32", "--batch-size", "2"]
    train = [aios, "train", "--name", "first", *tiny, "--max-steps", "4", "--eval-tokens", "100"]
    assert "parameters" in call(*train, "--dry-run", cwd=folder)
    call(*train, cwd=folder)
    call(aios, "generate", "first", "--prompt", "The sun", "--max-new-tokens", "4", cwd=folder)
    assert json.loads(call(aios, "brains", "list", "--json", cwd=folder))


def call(*words: object, cwd: Path) -> str:
    """What a command printed; its failure is ours."""
    print("$", *(Path(str(word)).name if str(word).startswith("/") else word for word in words), flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(f"{' '.join(map(str, words))} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
