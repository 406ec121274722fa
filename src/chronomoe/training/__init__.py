"""Training: configuration, loop, callbacks, checkpoints, evaluation. Names load when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chronomoe.control.checkpoint import ChronovisorCheckpoint as ChronovisorCheckpoint
    from chronomoe.knob import KnobScheduler as KnobScheduler
    from chronomoe.routing.losses import ChronoMoELoss as ChronoMoELoss
    from chronomoe.training.callback import Callback as Callback
    from chronomoe.training.config import TrainingConfig as TrainingConfig
    from chronomoe.training.gating import CoherenceGatedOptimizer as CoherenceGatedOptimizer
    from chronomoe.training.trainer import ChronoMoETrainer as ChronoMoETrainer
    from chronomoe.training.transformers_callback import ChronoMoECallback as ChronoMoECallback

_HOME = {
    "Callback": "chronomoe.training.callback",
    "ChronoMoECallback": "chronomoe.training.transformers_callback",
    "ChronoMoELoss": "chronomoe.routing.losses",
    "ChronoMoETrainer": "chronomoe.training.trainer",
    "ChronovisorCheckpoint": "chronomoe.control.checkpoint",
    "CoherenceGatedOptimizer": "chronomoe.training.gating",
    "KnobScheduler": "chronomoe.knob",
    "TrainingConfig": "chronomoe.training.config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chronomoe.training' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
