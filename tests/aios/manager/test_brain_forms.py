"""What the forms offer of a brain's data comes from the one reader of prepared data."""

from types import SimpleNamespace

import pytest

from aios.manager.brain_forms import _domains
from chronomoe.data.store_info import read_info
from chronomoe.errors import DataError


def test_domains_with_held_out_text_are_offered(straight):
    found = _domains(SimpleNamespace(root=straight), "mixtral/straight")
    info = read_info(straight / "training_data/prepared")
    assert found == [one.name for one in info.domains if one.heldout.tokens] != []


@pytest.mark.parametrize(("content", "said"), [("{", "is damaged"), ('{"domains": []}', "is damaged")])
def test_damaged_data_is_refused_in_one_sentence(brain, content, said):
    root = brain.parents[3]
    (root / "training_data/prepared/data.json").write_text(content)
    with pytest.raises(DataError, match=said):
        _domains(SimpleNamespace(root=root), "mixtral/straight")


def test_a_brain_without_data_offers_none(tmp_path):
    assert _domains(SimpleNamespace(root=tmp_path), "mixtral/none") == []
