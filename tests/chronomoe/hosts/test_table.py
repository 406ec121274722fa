"""The table of hosts says of each family what transformers builds."""

import pytest

from chronomoe.hosts.table import HOSTS, SUPPORTED, at_path, host_of
from tests.chronomoe.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_a_row_with_its_paths(host, family):
    layer = host(family).model.layers[0]
    row = host_of(layer)
    assert row is HOSTS[type(at_path(layer, row.router)).__name__]
    block = at_path(layer, row.block)
    assert at_path(layer, row.router) in block.children()
    assert at_path(layer, row.experts) in block.children()
    assert at_path(layer, row.attention) is not None
    assert row.title in SUPPORTED


def test_every_row_is_a_family_that_is_tested():
    assert len(HOSTS) == len(FAMILIES)


def test_a_layer_without_a_router_has_no_row(host):
    layer = host("mixtral").model.layers[0]
    layer.mlp = layer.self_attn
    assert host_of(layer) is None
    assert at_path(layer, "mlp.no.such.path") is None
