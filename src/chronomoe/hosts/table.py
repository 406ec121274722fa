"""HOSTS: what chronomoe knows of each router class of transformers that it can steer."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Host:
    """How a family's routers turn logits into weights, and where they sit in a layer of the decoder."""

    title: str
    """The family, as errors name it."""
    kind: Literal["softmax"] = "softmax"
    """softmax: probabilities over all experts, then the K largest."""
    keep_dtype: bool
    """Weights come back in the dtype of the hidden states (else fp32)."""
    always_normalised: bool = False
    """Weights of the chosen experts sum to 1 (else the router says, in ``norm_topk_prob``)."""
    attention: str = "self_attn"
    """Path in a layer of what runs before the block and receives the layer's extra arguments."""
    block: str = "mlp"
    """Path in a layer of the MoE block."""
    router: str = "mlp.gate"
    """Path in a layer of the router."""
    experts: str = "mlp.experts"
    """Path in a layer of the experts."""


HOSTS = {
    "MixtralTopKRouter": Host(title="Mixtral", keep_dtype=False, always_normalised=True),
    "OlmoeTopKRouter": Host(title="OLMoE", keep_dtype=True),
    "Qwen2MoeTopKRouter": Host(title="Qwen2-MoE", keep_dtype=True),
    "Qwen3MoeTopKRouter": Host(title="Qwen3-MoE", keep_dtype=True),
}
"""By the router's class name."""

_TITLES = [host.title for host in HOSTS.values()]
SUPPORTED = f"{', '.join(_TITLES[:-1])} and {_TITLES[-1]}"
"""The families, for errors."""


def host_of(layer: Any) -> Host | None:
    """The row of the router in a layer of a decoder; None for a layer without a router that can be steered."""
    for name, host in HOSTS.items():
        if type(at_path(layer, host.router)).__name__ == name:
            return host
    return None


def at_path(module: Any, path: str) -> Any:
    """The submodule at a dotted path; None where it is not there."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
