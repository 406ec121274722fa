import json

import torch


def test_doctor(aios):
    facts = json.loads(aios("doctor", "--json").out)
    assert facts["torch"] == torch.__version__
    plain = aios("doctor")
    assert plain.code == 0
    assert [line.split("  ")[0] for line in plain.out.splitlines()] == list(facts)
