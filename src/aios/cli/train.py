"""aios train."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.brains.settings import BrainTraining, ModelShape, Run, RunSettings
from aios.settings.goals import TrainingGoals
from aios.workspace import Workspace

Flat = Parameter(name="*")


def train(
    *,
    config: Path | None = None,
    settings: Annotated[RunSettings, Flat] = RunSettings(),  # noqa: B008 (frozen)
    shape: Annotated[ModelShape, Flat] = ModelShape(),  # noqa: B008
    training: Annotated[BrainTraining, Flat] = BrainTraining(),  # noqa: B008
    goals: Annotated[TrainingGoals, Flat] = TrainingGoals(),  # noqa: B008
) -> int:
    """Train a Mixtral-style brain on prepared data, or continue one with --resume.

    Ctrl-C saves and stops; --resume goes on as if nothing had happened.

    Parameters
    ----------
    config
        TOML file whose keys are the names of these options; options given here win.
    """
    from aios.actions.quiet import quiet_libraries

    quiet_libraries()
    from aios.brains.train import train as train_brain

    results = train_brain(Run(settings=settings, shape=shape, training=training, goals=goals))
    if settings.dry_run:
        return 0
    workspace = Workspace(settings.root)
    if results["finished"]:
        print(f"Next: {workspace.command('generate', settings.name)}")
    else:
        go_on = workspace.command("train", "--name", settings.name, "--resume")
        print(f"Stopped at step {results['global_step']}, saved. Continue with: {go_on}")
    return 130 if results["interrupted"] else 0
