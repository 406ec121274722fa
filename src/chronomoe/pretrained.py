"""SteeredPreTrained: what steered models that are built by us add to transformers' PreTrainedModel."""

from typing import Any

from chronomoe import sidecars
from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.errors import ConfigError
from chronomoe.hosts.attach import attach, make_state_new
from chronomoe.routing.state import SteeringConfig
from chronomoe.routing.steering import Steering


class SteeredPreTrained:
    """Mixed into a causal language model: ``model.steering`` holds the fields, ``model.controller`` moves them."""

    steering: Steering
    controller: ChronovisorMixtralController

    def steer(self, dispatch: str) -> None:
        """Attach as ``steering`` and ``control`` of the configuration say; :class:`ConfigError` if they are unknown."""
        config: Any = self.config  # type: ignore[attr-defined]
        enabled = {"enabled": getattr(config, "enable_chronovisor", True)}
        try:
            steering = SteeringConfig.from_json({**(getattr(config, "steering", None) or {}), **enabled}, "steering")
            control = ControlConfig.from_json(getattr(config, "control", None) or {}, "control")
        except ConfigError as error:
            raise ConfigError(
                f"{str(error).removesuffix('.')} in the model's configuration; if version 0.1.0 wrote it, train the "
                "model again."
            ) from error
        attach(self, steering, control, dispatch=dispatch)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: Any, *args: Any, control: bool = True, **kwargs: Any) -> None:
        """As transformers' own, with the sidecars beside the unchanged base; see :mod:`chronomoe.sidecars`.

        ``control=False`` leaves out the control layer: the model then loads with neutral fields.
        """
        state = kwargs.pop("state_dict", None) or self.state_dict()  # type: ignore[attr-defined]
        kwargs["state_dict"] = {name: t for name, t in state.items() if not name.startswith("subbrains.")}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        sidecars.save(self, save_directory, control=control)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers' own, with the sidecars beside the model; a plain checkpoint has none and neutral fields.

        Raises :class:`CheckpointError` for a model that version 0.1.0 saved, or a sidecar that is damaged.
        """
        folder = sidecars.folder_of(pretrained_model_name_or_path, **kwargs)
        if folder is not None:
            sidecars.refuse_old(sidecars.weight_names(folder), folder)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        sidecars.refuse_old(info["unexpected_keys"], folder)  # of weights that were downloaded only now
        make_state_new(model)
        if folder is not None:
            sidecars.load(model, folder)
        return (model, info) if output_loading_info else model

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the source of this module, where it cannot be

    @property
    def num_active_params(self) -> int:
        """Parameters one token uses: all but the experts it is not sent to."""
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)  # type: ignore[attr-defined]
        total = sum(p.numel() for p in self.parameters())  # type: ignore[attr-defined]
        steering = getattr(self, "steering", None)
        return total if steering is None else total - experts + experts * steering.top_k // steering.num_experts
