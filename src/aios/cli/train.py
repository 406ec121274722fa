"""aios train."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.brains.settings import ModelShape, Run, RunSettings
from chronomoe.training.config import TrainingConfig

Flat = Parameter(name="*")


def train(
    *,
    config: Path | None = None,
    settings: Annotated[RunSettings, Flat] = RunSettings(),  # noqa: B008 (frozen)
    shape: Annotated[ModelShape, Flat] = ModelShape(),  # noqa: B008
    training: Annotated[TrainingConfig, Flat] = TrainingConfig(),  # noqa: B008
) -> int:
    """Train a Mixtral-style brain on prepared data, or continue one with --resume.

    Ctrl-C saves and stops; --resume goes on as if nothing had happened.

    Parameters
    ----------
    config
        TOML file whose keys are the names of these options; options given here win.
    """
    from aios.brains.train import train as train_brain
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    results = train_brain(Run(settings=settings, shape=shape, training=training))
    if results.get("interrupted"):
        name = f"--name {settings.name} --resume"
        print(f"Stopped at step {results['global_step']}, saved. Continue with: aios train {name}")
        return 130
    return 0
