"""What the tests of the control layer share: how often its laws are drawn, and calls of routers made by hand."""

from hypothesis import settings

from chronomoe.routing.context import RoutedCall, used_experts

many = settings(max_examples=500)
"""Some ten thousand examples over all files that use this."""


def one_call(layer, h, z, p, chosen, w):
    """What ``RoutingStatistics.record`` is given of one call of one router, without padding or a capacity limit."""
    used, made = used_experts(chosen, z.shape[-1], None, None), {"logits": z, "probabilities": p, "chosen": chosen}
    call = RoutedCall(layer=layer, depth=0, carries_gradient=False, **made, weights=w, used=used, input_sums=used.T @ h)
    return [call], z.unsqueeze(0), p.unsqueeze(0)
