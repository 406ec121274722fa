"""aios demo: the main job, end to end, on real text."""

import shlex
import time
from pathlib import Path

from aios.workspace import Workspace


def demo(*, root: Path = Path("demo"), steps: int = 800) -> int:
    """Prepare sample text, train half way, resume, evaluate against a unigram model, sample.

    Parameters
    ----------
    root
        Folder to work in; each demo trains a new brain there.
    steps
        Training steps.
    """
    from aios.brains.base import make_workspace
    from aios.brains.bundle import load_brain
    from aios.brains.generate import sample_text
    from aios.brains.settings import BrainTraining, Run, RunSettings
    from aios.brains.train import train
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    began = time.perf_counter()
    training = BrainTraining(
        max_steps=steps,
        batch_size=8,
        learning_rate=4e-3,
        weight_decay=0.1,
        log_every_n_steps=50,
        eval_every_n_steps=max(1, steps // 2),
        save_every_n_steps=max(1, steps // 2),
    )
    make_workspace(root, max_bytes=2_000_000)
    workspace = Workspace(root)
    name = _free_name(workspace)
    first = RunSettings(root=root, name=name, seq_len=128, stop_after=max(1, steps // 2))
    results = train(Run(settings=first, training=training))
    if not results["interrupted"]:
        print(f"Stopped at step {results['global_step']} on purpose; resuming from its checkpoint.")
        results = train(Run(settings=RunSettings(root=root, name=name, resume=True)))
    if results["interrupted"]:
        print(f"Stopped, saved. Continue with: {workspace.command('train', '--name', name, '--resume')}")
        return 130
    print("\nHeld-out bits per byte        this brain   unigram model")
    for domain, unigram in results["unigram"].items():
        print(f"  {domain:<26}  {results['evaluation'][domain]:10.3f}   {unigram:13.3f}")
    bundle = results["bundle"]
    model, tokenizer = load_brain(bundle)
    print("\nA sample:\n" + sample_text(model, tokenizer, "The people of the United States", max_new_tokens=80))
    print(
        f"\nDone in {time.perf_counter() - began:.0f} s. Written below {root}:\n"
        f"  {bundle}  the brain: weights, tokenizer, checkpoints, metrics.jsonl, model card\n"
        f"  {workspace.training_data}  sample texts (see DATA.md) and prepared tokens\n"
        "Try next:"
    )
    settings, mine, base = str(root / "run.toml"), str(root / "mine"), str(workspace.base_model)
    for command in (
        workspace.command("generate", name, "--prompt", "My fellow citizens"),
        workspace.command("train", "--config", settings),
        shlex.join(["aios", "data", "prepare", "mine=/path/to/your/text", "--out", mine, "--tokenizer", base]),
        workspace.command("train", "--config", settings, "--name", "mine", "--data", mine),
    ):
        print(f"  {command}")
    return 0


def _free_name(workspace: Workspace) -> str:
    number = 1
    while workspace.brain(f"demo{number}").exists():
        number += 1
    return f"demo{number}"
