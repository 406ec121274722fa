"""Training: configuration, loop, checkpoints, evaluation, token store. Names load when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chronomoe.training.callback import ChronoMoECallback as ChronoMoECallback
    from chronomoe.training.config import TrainingConfig as TrainingConfig
    from chronomoe.training.trainer import ChronoMoETrainer as ChronoMoETrainer

_HOME = {
    "ChronoMoECallback": "chronomoe.training.callback",
    "ChronoMoETrainer": "chronomoe.training.trainer",
    "TrainingConfig": "chronomoe.training.config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chronomoe.training' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
