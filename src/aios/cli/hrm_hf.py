"""aios hrm-hf: the hierarchical reasoning model."""

from typing import Annotated

from cyclopts import Parameter

from aios.brains.actv1 import ACTv1Flags, train_actv1
from aios.brains.settings import HRMShape
from aios.settings.goals import TrainingGoals
from aios.workspace import Workspace
from chronomoe.errors import ConfigError

Flat = Parameter(name="*")

REFUSED = {
    "cuda-ids": "set CUDA_VISIBLE_DEVICES, or use accelerate launch --gpu_ids",
    "dataset-chunk-size": "text of any size is read from disk as it is needed",
    "sys-mem-cap-pct": "use a smaller --batch-size, or --use-chunked-training",
    "use-flash-attn": "attention takes the fastest kernel there is by itself",
    "flash-attn": "attention takes the fastest kernel there is by itself",
    "stop-after-epoch": "set --steps",
    "force-train": "nothing is skipped here",
    "start-block-id": "use --dataset-start-offset",
    "start-chunk-id": "use --dataset-start-offset",
    "adaptive-lr-config": "the learning rate warms up and follows a cosine; set --lr",
    "adaptive-lr-debug-level": "the learning rate is in every metrics record",
    "adaptive-lr-window-summary": "the learning rate is in every metrics record",
    "adaptive-lr-window-summary-every": "the learning rate is in every metrics record",
    "adaptive-lr-state-path": "the schedule is part of every checkpoint",
    "adaptive-lr-reset-state": "a brain under another --brain-name begins anew",
    "optimize": "--dry-run tells memory and time; then set --batch-size and --max-seq-len",
    "cpu-offload": "use --use-chunked-training, or --zero-stage with DeepSpeed",
    "use-peft": "the model is an ordinary transformers model: use peft on it in Python",
    "peft-method": "the model is an ordinary transformers model: use peft on it in Python",
    "lora-r": "the model is an ordinary transformers model: use peft on it in Python",
    "lora-alpha": "the model is an ordinary transformers model: use peft on it in Python",
    "lora-dropout": "the model is an ordinary transformers model: use peft on it in Python",
    "lora-target-modules": "the model is an ordinary transformers model: use peft on it in Python",
    "load-in-8bit": "nothing here trains quantised weights; --use-8bit-optimizer saves memory",
    "load-in-4bit": "nothing here trains quantised weights; --use-8bit-optimizer saves memory",
    "strict": "a run never goes on with other settings than it was given",
    "parallel-independent": "averaging models trained apart breaks them; use accelerate launch",
    "inference-device": "use `aios generate` beside the run",
    "hot-reload-steps": "use `aios generate` beside the run: it takes the latest checkpoint",
}
"""Flags of the first AI-OS that this design cannot honour, and what to use instead."""


def refuse(words: list[str]) -> None:
    """Raise :class:`ConfigError` for a flag that is not taken over."""
    for word in words:
        name = word.removeprefix("--").removeprefix("no-").partition("=")[0].replace("_", "-")
        if word.startswith("--") and name in REFUSED:
            raise ConfigError(f"--{name} is not supported: {REFUSED[name]}.")


def train_actv1_command(
    *,
    flags: Annotated[ACTv1Flags, Flat] = ACTv1Flags(),  # noqa: B008 (frozen)
    shape: Annotated[HRMShape, Flat] = HRMShape(),  # noqa: B008
    goals: Annotated[TrainingGoals, Flat] = TrainingGoals(),  # noqa: B008
) -> int:
    """Train a hierarchical reasoning model with experts on a text, or continue one with --resume.

    Ctrl-C and the stop file save and stop; --resume goes on as if nothing had happened.
    """
    from aios.actions.quiet import quiet_libraries

    quiet_libraries()
    results = train_actv1(flags, shape, goals)
    if flags.dry_run:
        return 0
    if flags.expert_id is not None:
        return 130 if results["interrupted"] else 0
    workspace = Workspace(flags.root)
    name = f"actv1/{flags.brain_name}" if flags.brain_name and flags.bundle_dir is None else str(flags.bundle)
    if results["finished"]:
        print(f"Next: {workspace.command('generate', name)}")
    else:
        named = flags.brain_name and flags.bundle_dir is None
        place = ("--brain-name", str(flags.brain_name)) if named else ("--save-dir", str(flags.bundle))
        go_on = workspace.command("hrm-hf", "train-actv1", *place, "--resume")
        print(f"Stopped at step {results['global_step']}, saved. Continue with: {go_on}")
    return 130 if results["interrupted"] else 0


def arch_summary(
    *,
    shape: Annotated[HRMShape, Flat] = HRMShape(),  # noqa: B008
    vocab_size: int = 4096,
    max_seq_len: int = 128,
    batch_size: int = 8,
) -> None:
    """Print what an architecture costs: parameters in all and active, operations per token, memory.

    Parameters
    ----------
    vocab_size
        Tokens of the tokenizer.
    max_seq_len
        Tokens per training sequence.
    batch_size
        Sequences per micro-batch.
    """
    from aios.actions.quiet import quiet_libraries
    from aios.brains.plan import describe_architecture

    quiet_libraries()
    if min(vocab_size, max_seq_len, batch_size) < 1:
        raise ConfigError("vocab_size, max_seq_len and batch_size must be at least 1.")
    import torch

    from aios.brains.families import ACTV1

    with torch.device("meta"):
        model = ACTV1.model_class(ACTV1.configure(shape, vocab_size, max_seq_len))
    for line in describe_architecture(model, batch_size * max_seq_len):
        print(line)
