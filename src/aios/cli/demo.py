"""aios demo: the main job, end to end, on real text."""

import time
from pathlib import Path


def demo(*, root: Path = Path("demo"), steps: int = 300) -> int:
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
    from aios.brains.settings import Run, RunSettings
    from aios.brains.train import train
    from aios.cli.quiet import quiet_libraries
    from chronomoe.training.config import TrainingConfig

    quiet_libraries()
    began = time.perf_counter()
    make_workspace(root, max_bytes=2_000_000)
    training = TrainingConfig(
        max_steps=steps,
        batch_size=16,
        learning_rate=3e-3,
        weight_decay=0.1,
        log_every_n_steps=25,
        eval_every_n_steps=max(1, steps // 3),
        save_every_n_steps=max(1, steps // 3),
    )
    name = _free_name(root)
    first = RunSettings(root=root, name=name, seq_len=128, stop_after=max(1, steps // 2))
    results = train(Run(settings=first, training=training))
    if not results["interrupted"]:
        print(f"Stopped at step {results['global_step']} on purpose; resuming from its checkpoint.")
        results = train(Run(settings=RunSettings(root=root, name=name, resume=True)))
    if results["interrupted"]:
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
        f"  {root / 'training_data'}  sample texts (see DATA.md) and prepared tokens\n"
        "Try next:\n"
        f"  aios generate {bundle} --prompt 'My fellow citizens'\n"
        f"  aios train --root {root} --config {root / 'run.toml'}\n"
        f"  aios data prepare mine=/path/to/your/text --out {root / 'mine'} "
        f"--tokenizer {root / 'artifacts/hf_implant/base_model'}\n"
        f"  aios train --root {root} --config {root / 'run.toml'} --name mine --data {root / 'mine'}"
    )
    return 0


def _free_name(root: Path) -> str:
    from aios.workspace import Workspace

    number = 1
    while Workspace(root).brain(f"demo{number}").exists():
        number += 1
    return f"demo{number}"
