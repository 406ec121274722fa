"""chronomoe: train, steer and grow sparse Mixture-of-Experts language models.

The names below are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from chronomoe.chronovisor_mixtral_bridge import ChronovisorMixtralForCausalLM as ChronovisorMixtralForCausalLM
    from chronomoe.control.config import ControlConfig as ControlConfig
    from chronomoe.control.controller import ChronovisorMixtralController as ChronovisorMixtralController
    from chronomoe.hosts.attach import attach as attach
    from chronomoe.mixtral_core import MixtralConfig as MixtralConfig
    from chronomoe.routing.state import SteeringConfig as SteeringConfig
    from chronomoe.routing.steering import Steering as Steering

_HOME = {
    "ChronovisorMixtralController": "chronomoe.control.controller",
    "ChronovisorMixtralForCausalLM": "chronomoe.chronovisor_mixtral_bridge",
    "ControlConfig": "chronomoe.control.config",
    "MixtralConfig": "chronomoe.mixtral_core",
    "Steering": "chronomoe.routing.steering",
    "SteeringConfig": "chronomoe.routing.state",
    "attach": "chronomoe.hosts.attach",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chronomoe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
