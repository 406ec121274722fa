"""ChronovisorCheckpoint: everything the control layer knows, on disk, so that a run goes on as if it had not stopped.

    chronovisor.safetensors   every buffer of the controller, and of the routers' fields as steering.<name>;
                              one that has layers as lens_states.<layer>.<name>
    chronovisor.json          version, settings, kappa, histories

A field that is missing or unknown is an error, never a default.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.errors import CheckpointError
from chronomoe.settings import Bounds, FileFormat, Settings, Share
from chronomoe.tensors import read_tensors, save_tensors

TENSORS, REST = "chronovisor.safetensors", "chronovisor.json"
Kappa = Annotated[float, Bounds(ge=-1, le=1)]
_WITHOUT_LAYERS = (
    "structural_T_global", "fast_blocks", "block_rates", "evidence", "ticks", "steering.base_temperature",
    "steering.exploration",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ControlRecord(Settings):
    """What ``chronovisor.json`` holds."""

    file_format: ClassVar = FileFormat(
        name="chronovisor",
        version=3,
        remedy="use another checkpoint",
        outdated="train again, or continue the run with that version",
    )

    control: ControlConfig
    """The controller's settings."""
    coherence_history: tuple[Share, ...]
    """The last R's, newest last."""
    kappa: Kappa
    intent: str
    meta_knob_history: tuple[tuple[Kappa, str], ...]
    """The last kappas and intents, newest last."""


@dataclass(frozen=True, kw_only=True)
class ChronovisorCheckpoint:
    """The state of one controller and of the fields it moves."""

    tensors: dict[str, Tensor]
    """By their names in the file."""
    record: ControlRecord

    @property
    def structural_T_global(self) -> Tensor:  # noqa: N802 (the name in the file)
        """(N,) log structural temperature of each expert slot: the slowest memory."""
        return self.tensors["structural_T_global"]

    @property
    def lens_states(self) -> dict[int, dict[str, Tensor]]:
        """MoE layer -> everything kept for it: pressure, temperatures, directions, health, loads."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("lens_states."):
                _, layer, field = name.split(".", 2)
                found.setdefault(int(layer), {})[field] = tensor
        return found

    @property
    def coherence_history(self) -> list[float]:
        """The last R's, newest last."""
        return list(self.record.coherence_history)

    @property
    def meta_knob_history(self) -> list[tuple[float, str]]:
        """The last kappas and intents, newest last."""
        return list(self.record.meta_knob_history)

    @classmethod
    def from_controller(cls, controller: ChronovisorMixtralController) -> "ChronovisorCheckpoint":
        """A copy of everything."""
        knob = controller.meta_knob
        record = ControlRecord(
            control=controller.config,
            coherence_history=tuple(controller.coherence_history),
            kappa=knob.kappa,
            intent=knob.intent,
            meta_knob_history=tuple(knob.history),
        )
        return cls(tensors={name: tensor.clone() for name, tensor in _tensors(controller).items()}, record=record)

    def save(self, folder: Path | str) -> None:
        """Write both files into a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_tensors(Path(folder) / TENSORS, self.tensors)
        self.record.write_file(Path(folder) / REST)

    @classmethod
    def load(cls, folder: Path | str) -> "ChronovisorCheckpoint":
        """Read both files; :class:`CheckpointError` when one is missing, damaged or of another version."""
        folder = Path(folder)
        try:
            record = ControlRecord.read_file(folder / REST, exact=True)
        except FileNotFoundError:
            raise CheckpointError(f"the checkpoint {folder} has no {REST}; use another one.") from None
        return cls(tensors=read_tensors(folder / TENSORS), record=record)

    def refuse_unfit(self, controller: ChronovisorMixtralController, where: Path = Path("memory")) -> None:
        """:class:`CheckpointError` when a field is missing, unknown, impossible, or of another shape or type."""
        needed = _tensors(controller)
        if wrong := sorted(needed.keys() ^ self.tensors.keys()):
            raise CheckpointError(f"{where}: the field {wrong[0]} is missing or unknown for this model.")
        for name, tensor in needed.items():
            found = self.tensors[name]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise CheckpointError(f"{where}: {name} has another shape or type than in this model.")
            if not found.isfinite().all():
                raise CheckpointError(f"{where}: {name} holds values that are not finite.")
            counts = name.rpartition(".")[2] in ("ticks", "last_probe", "fruitless")
            latest = self.tensors["ticks"] if name.endswith("last_probe") else None
            if counts and (found.lt(0).any() or (latest is not None and found.gt(latest).any())):
                raise CheckpointError(f"{where}: {name} is damaged: ticks are counted from 0 to the last.")

    @torch.no_grad()
    def restore_to_controller(self, controller: ChronovisorMixtralController, where: Path = Path("memory")) -> None:
        """Put everything back; :class:`CheckpointError`, and nothing changed, when it does not fit."""
        self.refuse_unfit(controller, where)
        for name, tensor in _tensors(controller).items():
            tensor.copy_(self.tensors[name])
        controller.coherence_history.clear()
        controller.coherence_history.extend(self.coherence_history)
        knob = controller.meta_knob
        knob.reset()
        knob.history.extend(self.meta_knob_history)
        knob.kappa, knob.intent = self.record.kappa, self.record.intent


def _tensors(controller: ChronovisorMixtralController) -> dict[str, Tensor]:
    """Every buffer by its name in the file, those with layers as one view a layer: write to them in place."""
    fields = {f"steering.{name}": buffer for name, buffer in controller.steering.named_buffers(recurse=False)}
    del fields["steering.goal_bias"]  # goals are turned on by who runs a model, not by a file
    found: dict[str, Tensor] = {}
    for name, buffer in {**dict(controller.named_buffers(recurse=False)), **fields}.items():
        if name in _WITHOUT_LAYERS:
            found[name] = buffer
        else:
            found |= {f"lens_states.{layer}.{name}": row for layer, row in enumerate(buffer)}
    return found
