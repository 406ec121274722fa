"""Every error a user of the library can meet.

    ChronoMoEError
    +-- ConfigError          a setting that cannot work; the message names it and a value that would
    +-- DataError            text or tokens that cannot be read or used
    +-- CheckpointError      a checkpoint that is missing, damaged, or belongs to something else
    +-- UnsupportedModelError  a model whose routers cannot be steered
    +-- TrainingError        a run that cannot go on (for example too many non-finite steps)

Messages are one sentence or two: what is wrong, named, and what to do about it.
"""


class ChronoMoEError(Exception):
    """Base of all errors raised on purpose by chronomoe and aios."""


class ConfigError(ChronoMoEError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(ChronoMoEError, ValueError):
    """Text or tokens that cannot be read or used."""


class CheckpointError(ChronoMoEError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class UnsupportedModelError(ChronoMoEError, TypeError):
    """A model whose routers chronomoe does not know how to steer."""


class TrainingError(ChronoMoEError, RuntimeError):
    """A training run that cannot go on."""
