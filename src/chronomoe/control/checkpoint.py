"""ChronovisorCheckpoint: everything the control layer knows, on disk, so that a run goes on as if it had not stopped.

    chronovisor.safetensors   every buffer of the controller and of the steering fields, by layer where it has layers
    chronovisor.json          version, settings, kappa, histories

A field that is missing or unknown is an error, never a default.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.knob import checked_kappa
from chronomoe.storage import write_json
from chronomoe.tensors import read_tensors, save_tensors

VERSION = 3
TENSORS, REST = "chronovisor.safetensors", "chronovisor.json"
_FIELDS = ("version", "control", "coherence_history", "kappa", "intent", "meta_knob_history")


@dataclass(frozen=True, kw_only=True)
class ChronovisorCheckpoint:
    """The state of one controller and the fields it moves."""

    structural_T_global: Tensor
    """(N,) log structural temperature of each expert slot: the slowest memory."""
    lens_states: dict[int, dict[str, Tensor]]
    """MoE layer -> everything kept for it: pressure, temperatures, directions, health, loads."""
    rest: dict[str, Tensor]
    """What belongs to no layer: counters, base temperature, noise, blocks of the landscape."""
    coherence_history: list[float]
    """The last R's, newest last."""
    meta_knob_history: list[tuple[float, str]]
    """The last kappas and intents."""
    kappa: float
    intent: str
    control: dict[str, Any]
    """The controller's settings."""

    @classmethod
    def from_controller(cls, controller: ChronovisorMixtralController) -> "ChronovisorCheckpoint":
        """A copy of everything."""
        state = {name: tensor.detach().clone() for name, tensor in _state(controller).items()}
        layers = len(controller.health)
        by_layer = {
            layer: {name: tensor[layer] for name, tensor in state.items() if _has_layers(name)}
            for layer in range(layers)
        }
        return cls(
            structural_T_global=state["structural_T_global"],
            lens_states=by_layer,
            rest={
                name: tensor
                for name, tensor in state.items()
                if not _has_layers(name) and name != "structural_T_global"
            },
            coherence_history=list(controller.coherence_history),
            meta_knob_history=list(controller.meta_knob.history),
            kappa=controller.meta_knob.kappa,
            intent=controller.meta_knob.intent,
            control=asdict(controller.config),
        )

    def save(self, folder: Path | str) -> None:
        """Write both files into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"structural_T_global": self.structural_T_global, **self.rest}
        for layer, kept in self.lens_states.items():
            tensors |= {f"lens_states.{layer}.{name}": tensor for name, tensor in kept.items()}
        save_tensors(folder / TENSORS, tensors)
        content = {
            "version": VERSION,
            "control": self.control,
            "coherence_history": self.coherence_history,
            "kappa": self.kappa,
            "intent": self.intent,
            "meta_knob_history": self.meta_knob_history,
        }
        write_json(folder / REST, content)

    @classmethod
    def load(cls, folder: Path | str) -> "ChronovisorCheckpoint":
        """Read both files; :class:`CheckpointError` when one is missing, damaged or of another version."""
        folder = Path(folder)
        tensors = read_tensors(folder / TENSORS)
        try:
            content = json.loads((folder / REST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"the checkpoint {folder} has no {REST}; use another one.") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder / REST} is damaged ({error}); use another checkpoint.") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise CheckpointError(f"{folder / REST} is not of version {VERSION}; this chronomoe cannot read it.")
        if wrong := sorted(set(content) ^ set(_FIELDS)):
            raise CheckpointError(
                f"{folder / REST}: the field {wrong[0]} is missing or unknown; use another checkpoint."
            )
        if "structural_T_global" not in tensors:
            raise CheckpointError(f"{folder / TENSORS} has no structural_T_global; use another checkpoint.")
        lens: dict[int, dict[str, Tensor]] = {}
        rest = {}
        try:
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} is not finite")
                if name.startswith("lens_states."):
                    _, layer, field = name.split(".", 2)
                    lens.setdefault(int(layer), {})[field] = tensor
                elif name != "structural_T_global":
                    rest[name] = tensor
            ControlConfig(**content["control"])
            if lost := {one.name for one in fields(ControlConfig)} - set(content["control"]):
                raise ValueError(f"control.{min(lost)} is missing")
            content["kappa"] = checked_kappa(content["kappa"])
            if not isinstance(content["intent"], str):
                raise ValueError("intent is not text")
            counts = [state[name] for state in (rest, *lens.values()) for name in _COUNTS if name in state]
            probes = [state["last_probe"] for state in lens.values() if "last_probe" in state and "ticks" in rest]
            if any(count.lt(0).any() for count in counts) or any(tick.gt(rest["ticks"]).any() for tick in probes):
                raise ValueError("ticks are counted from 0 to the last")
            history = content["coherence_history"]
            if not isinstance(history, list) or not all(0 <= float(r) <= 1 for r in history):
                raise ValueError("coherence_history is no list of numbers between 0 and 1")
            content["coherence_history"] = [float(r) for r in history]
            content["meta_knob_history"] = [
                (checked_kappa(kappa), str(intent)) for kappa, intent in content["meta_knob_history"]
            ]
        except (TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"{folder / REST} or its tensors are damaged ({error}); use another one.") from error
        return cls(
            structural_T_global=tensors["structural_T_global"],
            lens_states=dict(sorted(lens.items())),
            rest=rest,
            coherence_history=content["coherence_history"],
            meta_knob_history=content["meta_knob_history"],
            kappa=content["kappa"],
            intent=content["intent"],
            control=content["control"],
        )

    def refuse_unfit(self, controller: ChronovisorMixtralController, where: Path = Path("memory")) -> None:
        """:class:`CheckpointError` when a field or layer is missing or unknown, or has another shape or type."""
        mine = ChronovisorCheckpoint.from_controller(controller)
        for found, wanted in ((self.rest, mine.rest), (self.lens_states, mine.lens_states)):
            if wrong := sorted(map(str, set(found) ^ set(wanted))):
                raise CheckpointError(f"{where}: the field or layer {wrong[0]} is missing or unknown for this model.")
        for layer, needed in mine.lens_states.items():
            given = self.lens_states[layer]
            if wrong := sorted(set(needed) ^ set(given)):
                raise CheckpointError(f"{where}: the field {wrong[0]} of layer {layer} is missing or unknown.")
            if wrong := [name for name, value in needed.items() if given[name].shape != value.shape]:
                raise CheckpointError(f"{where}: {wrong[0]} of layer {layer} has another shape than in this model.")
        state = self._tensors()
        for name, tensor in _state(controller).items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise CheckpointError(f"{where}: {name} has another shape or type than in this model.")
            if not state[name].isfinite().all():
                raise CheckpointError(f"{where}: {name} holds values that are not finite.")

    def _tensors(self) -> dict[str, Tensor]:
        state = {"structural_T_global": self.structural_T_global, **self.rest}
        for name in self.lens_states[0]:
            state[name] = torch.stack([self.lens_states[layer][name] for layer in sorted(self.lens_states)])
        return state

    def restore_to_controller(self, controller: ChronovisorMixtralController, where: Path = Path("memory")) -> None:
        """Put everything back; :class:`CheckpointError`, and nothing changed, when it does not fit."""
        self.refuse_unfit(controller, where)
        state, kappa = self._tensors(), checked_kappa(self.kappa)
        with torch.no_grad():
            for name, buffer in _state(controller).items():
                buffer.copy_(state[name])
        controller.coherence_history.clear()
        controller.coherence_history.extend(self.coherence_history)
        controller.meta_knob.reset()
        controller.meta_knob.history.extend(self.meta_knob_history)
        controller.meta_knob.kappa, controller.meta_knob.intent = kappa, self.intent


_COUNTS = ("ticks", "last_probe", "fruitless")
_GLOBAL = (
    "structural_T_global",
    "fast_blocks",
    "block_rates",
    "evidence",
    "ticks",
    "steering.base_temperature",
    "steering.exploration",
)


def _has_layers(name: str) -> bool:
    return name not in _GLOBAL


def _state(controller: ChronovisorMixtralController) -> dict[str, Tensor]:
    """Every buffer by name; goals are on or off by who runs a model, not by a file."""
    fields = dict(controller.steering.named_buffers(recurse=False))
    del fields["goal_bias"]
    return {**dict(controller.named_buffers()), **{f"steering.{name}": tensor for name, tensor in fields.items()}}
