"""Actions that train a brain, and the cost of an architecture."""

from pathlib import Path
from typing import Annotated, Any

from aios.actions import Done, Flat, Show, action
from aios.brains.families import ACTV1
from aios.brains.plan import describe_architecture
from aios.settings.actv1 import ACTv1Run
from aios.settings.data import VOCAB_SIZE
from aios.settings.train import HRMShape, MixtralRun
from aios.workspace import Workspace
from chronomoe.errors import ConfigError
from chronomoe.training.config import TrainingConfig


@action(heavy=True)
def train(
    workspace: Path,
    *,
    config: Path | None = None,
    run: Annotated[MixtralRun, Flat] = MixtralRun(),  # noqa: B008 (frozen)
    show: Show = print,
) -> Done:
    """Train a Mixtral-style brain.

    On prepared data, or continue one with --resume. Ctrl-C saves and stops; a resumed run equals one that never
    stopped.

    Parameters
    ----------
    config
        TOML file whose keys are the names of these options; options given here win.
    """
    from aios.brains.train import train as train_brain
    from aios.goals.under import UnderGoals

    results = train_brain(run.replace(root=workspace), show, goals=UnderGoals())
    place = Workspace(workspace)
    name = str(run.name)
    return _done(results, place.command("generate", name), place.command("train", "--name", name, "--resume"))


@action(heavy=True)
def train_actv1(
    workspace: Path,
    *,
    run: Annotated[ACTv1Run, Flat] = ACTv1Run(),  # noqa: B008 (frozen)
    show: Show = print,
) -> Done:
    """Train an HRM ACTv1 with experts on a text.

    Or continue one with --resume. Ctrl-C and the stop file save and stop; a resumed run equals one that never stopped.
    """
    from aios.brains.actv1 import train_actv1 as train_brain
    from aios.goals.under import UnderGoals

    run = run.replace(root=workspace)
    if run.expert_id is not None:
        from aios.experts.fresh import train_expert_of

        results = train_expert_of(run, show)
        return Done(code=130 if results["interrupted"] else 0)
    results = train_brain(run, show, goals=UnderGoals())
    named = run.name is not None and run.bundle_dir is None
    brain = f"{run.family}/{run.name}" if named else str(run.bundle)
    which = ("--brain-name", str(run.name)) if named else ("--save-dir", str(run.bundle))
    place = Workspace(workspace)
    return _done(results, place.command("generate", brain), place.command("hrm-hf", "train-actv1", *which, "--resume"))


def _done(results: dict[str, Any], after: str, resume: str) -> Done:
    if not results:  # only a plan
        return Done()
    value = {name: results[name] for name in ("finished", "interrupted", "global_step", "evaluation", "unigram")}
    value["path"] = str(results["bundle"])
    step = results["global_step"]
    sentence = f"Next: {after}" if results["finished"] else f"Stopped at step {step}, saved. Continue with: {resume}"
    return Done(sentence, value, code=130 if results["interrupted"] else 0)


@action(heavy=True)
def arch_summary(
    workspace: Path,
    *,
    shape: Annotated[HRMShape, Flat] = HRMShape(),  # noqa: B008 (frozen)
    vocab_size: int = VOCAB_SIZE,
    max_seq_len: int = ACTv1Run.seq_len,
    batch_size: int = TrainingConfig.batch_size,
) -> Done:
    """Print what an architecture costs.

    Parameters in all and active, operations per token, memory.

    Parameters
    ----------
    vocab_size
        Tokens of the tokenizer.
    max_seq_len
        Tokens per training sequence.
    batch_size
        Sequences per micro-batch.
    """
    if min(vocab_size, max_seq_len, batch_size) < 1:
        raise ConfigError("vocab_size, max_seq_len and batch_size must be at least 1.")
    import torch

    with torch.device("meta"):
        model = ACTV1.model_class(ACTV1.configure(shape, vocab_size, max_seq_len))
    lines = describe_architecture(model, batch_size * max_seq_len)
    return Done("\n".join(lines), dict(line.split(maxsplit=1) for line in lines))
