"""A sample of the long traces: both families, a few steps, resumed and straight (see tests/long/traces.py)."""

import json

import pytest

from tests.long import traces


@pytest.mark.parametrize("family", traces.FAMILIES)
def test_a_resumed_trace_equals_the_straight_one(tmp_path, family):
    found = {
        f"{family}.{variant}": traces.run(family, variant, tmp_path / variant, steps=5, stop=3)
        for variant in ("straight", "resumed")
    }
    assert traces.same_run(found, family) == []
    steps = [record for record in found[f"{family}.straight"]["records"] if record["event"] == "train"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert {"loss", "grad_norm", "load", "pressure", "R"} <= set(steps[0])


def test_a_difference_is_named_by_its_first_place():
    record = {"event": "train", "step": 3, "loss": 0.1}
    mine = {"a": {"records": [record], "weights": "x"}}
    changed = json.loads(json.dumps(mine))
    assert traces.differences(mine, changed) == []
    changed["a"]["records"][0]["loss"] = 0.1 + 2**-56
    assert traces.differences(mine, changed) == ["a: train 3: loss is 0.1, not 0.10000000000000002"]
    assert traces.differences(mine, {"a": {"records": [record], "weights": "y"}}) == ["a: the final weights differ"]
    assert traces.differences(mine, {}) == ["a is in one file only"]
