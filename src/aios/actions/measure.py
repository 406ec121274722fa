"""Actions that measure: evaluate, plot."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.actions import Done, Flat, Note, action, to_stderr
from aios.actions.standard_input import as_file
from aios.brains.brain import Brain
from aios.brains.plot import plot_run
from aios.settings.goals import GoalFlags
from chronomoe.allocator import keep_freed_memory
from chronomoe.training.config import TrainingConfig


@action(heavy=True)
def evaluate(
    workspace: Path,
    name: str | None = None,
    *,
    brain: str = "small",
    text: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    data: Path | None = None,
    seq_len: int = 128,
    tokens: int = 32768,
    batch_size: int = TrainingConfig.batch_size,
    goals: Annotated[GoalFlags, Flat] = GoalFlags(),  # noqa: B008 (frozen)
    note: Note = to_stderr,
) -> Done:
    """Measure a brain on held-out text.

    In bits per byte: the brain alone, with its attached experts, with goals on.

    Parameters
    ----------
    name
        The same as --brain.
    brain
        Name of a brain, family/name, or the path of a bundle or checkpoint.
    text
        File or folder of text to measure on, all of it; - reads standard input. [what is held out of the data the brain
        was trained on]
    data
        Prepared data whose held-out text to measure on.
    seq_len
        Tokens per window.
    tokens
        Tokens per domain, at most.
    batch_size
        Windows at a time.
    """
    from aios.brains.evaluate import evaluate as measure
    from aios.brains.loaded import LoadedBrain

    keep_freed_memory()

    def turn_on(loaded: LoadedBrain) -> None:
        from aios.goals.use import describe_effect, turn_on_goals

        for line in describe_effect(turn_on_goals(loaded, goals)):
            note(line)

    sizes = {"seq_len": seq_len, "tokens": tokens, "batch_size": batch_size}
    found = Brain.at(workspace, name or brain)
    with as_file(text) as file:
        return Done(value=measure(found, turn_on if goals.wanted else None, text=file, data=data, **sizes))


@action(heavy=True)
def plot(workspace: Path, run: str, *, out: Path | None = None) -> Done:
    """Plot a run.

    As PNG: loss, kappa/R/gate, load of every expert, landscape of structural temperature.

    Parameters
    ----------
    run
        Name of a brain, or the path of a bundle or of a metrics.jsonl.
    out
        Folder for the pictures; plots/ beside the metrics when not given.
    """

    made = [str(path) for path in plot_run(Path(run) if Path(run).is_file() else Brain.at(workspace, run).path, out)]
    return Done("\n".join(f"Wrote {path}" for path in made), {"paths": made})
