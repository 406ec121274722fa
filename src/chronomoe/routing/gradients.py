"""How strongly each loss term pulls at the routers, next to the language model's own pull.

A term far above a tenth of it runs the routers instead of the data. Measured on demand, on one forward, through the
logits of each layer's last call alone: cheap, since nothing is traversed beyond them.

Shape suffixes: L MoE layers, T tokens, N experts, D hidden size.
"""

import torch
from torch import Tensor

from chronomoe.routing.context import RoutingContext
from chronomoe.routing.steering import Steering


def compare_gradients(steering: Steering, context: RoutingContext, by_layer: dict[str, Tensor]) -> None:
    """Put each weighted term's gradient norm at the router weights into ``steering.gradient_norms``.

    ``lm`` joins them when the backward pass of this forward has run: what reaches the logits beyond the terms.
    """
    weights = steering.config.loss.weights
    squares = {name: torch.zeros(()) for name in by_layer}
    squares["lm"] = torch.zeros(())
    measured = {} if context.sums is None else context.sums.measured
    for index, (_, (z_TN, h_TD)) in enumerate(sorted(measured.items())):
        own_ND = torch.zeros((z_TN.shape[1], h_TD.shape[1]), device=z_TN.device)
        for name, values_L in by_layer.items():
            if not values_L.requires_grad:
                continue
            term = weights[name] * values_L[index] / len(measured)
            (grad_TN,) = torch.autograd.grad(term, z_TN, retain_graph=True, allow_unused=True)
            if grad_TN is not None:
                grad_ND = grad_TN.T @ h_TD.float()
                own_ND += grad_ND
                squares[name] += grad_ND.square().sum().cpu()

        def rest(total_TN: Tensor, h_TD: Tensor = h_TD, own_ND: Tensor = own_ND) -> None:
            squares["lm"] += (total_TN.T @ h_TD.float() - own_ND).square().sum().cpu()
            steering.gradient_norms = {name: square.sqrt() for name, square in squares.items()}

        z_TN.register_hook(rest)
