"""What the tests of the control layer share: how often its laws are drawn, and calls of routers made by hand."""

from hypothesis import settings

from chronomoe.routing.calls import RoutedCall

many = settings(max_examples=500)
"""Some ten thousand examples over all files that use this."""


def one_call(layer, h, z, p, chosen, w):
    """What ``RoutingStatistics.record`` is given of one call of one router, without padding or a capacity limit."""
    call = RoutedCall(
        layer=layer, depth=0, carries_gradient=False, logits=z, probabilities=p, chosen=chosen, weights=w, inputs=h
    )
    return [call], z.unsqueeze(0), p.unsqueeze(0)
