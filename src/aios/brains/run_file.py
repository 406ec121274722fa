"""RunFile: ``run.json`` of a brain, the settings of its run and what is known of its data and result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from aios.settings.actv1 import ACTv1Run
from aios.settings.train import MixtralRun, TrainRun
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.settings import FileFormat, NonNegativeInt, Settings, annotations_of
from chronomoe.training.config import TrainingConfig

RUN_FILE = "run.json"
RUNS: dict[str, type[TrainRun]] = {kind.family: kind for kind in (MixtralRun, ACTv1Run)}
"""Settings of a run by family."""


@dataclass(frozen=True, kw_only=True)
class RunFile(Settings):
    """What ``run.json`` holds. Flags that concern one call are not in it."""

    file_format: ClassVar = FileFormat(
        name="aios-run",
        version=2,
        remedy="put a copy back, or train under another name",
        outdated="train the brain again under another name",
    )

    family: Literal["mixtral", "actv1"]
    run: TrainRun
    """The run as it was asked for; the class is the family's."""
    tokenizer_fingerprint: str | None = None
    data_fingerprint: str | None = None
    published_step: NonNegativeInt | None = None
    """The step of the model in the folder itself; None until a run has ended."""
    bits_per_byte: float | None = None
    """Mean over the domains of that model's held-out text."""
    upcycled: dict[str, Any] | None = None
    """What the brain was made from, and how, if it was upcycled."""

    @classmethod
    def from_json(cls, raw: Any, where: str = "", *, exact: bool = False) -> Self:
        """As of :meth:`Settings.from_json`; the family says what the run's settings are."""
        family = raw.get("family") if isinstance(raw, dict) else None
        if not isinstance(family, str) or family not in RUNS:
            raise ConfigError(f"family is {family!r}; use one of {', '.join(RUNS)}.")
        if "run" in raw:
            raw = raw | {"run": RUNS[family].from_json(raw["run"], "run", exact=exact)}
        return super().from_json(raw, where, exact=exact)

    @classmethod
    def of(cls, file: Path) -> Self:
        """Read the run.json of a brain; :class:`CheckpointError` when it is missing or not ours."""
        try:
            return cls.read_file(file)
        except FileNotFoundError:
            brain = file.parent
            if brain.is_dir() and any(brain.rglob("*.safetensors")):
                raise CheckpointError(
                    f"{brain} has lost its run.json; put it back or train under another name."
                ) from None
            raise CheckpointError(f"there is no brain {brain} to continue; leave out --resume to begin it.") from None

    def training_json(self) -> dict[str, Any]:
        """The library's settings of the run, for JSON."""
        resolved = self.run.resolved()
        return {name: getattr(resolved, name) for name in annotations_of(TrainingConfig)}
