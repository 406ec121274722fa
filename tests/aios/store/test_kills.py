"""Ten of the kills of `python -m tests.long.kills`, spread over its scenarios."""

from pathlib import Path

import pytest

from tests.long import kills


@pytest.mark.parametrize("name", ["rename", "delete with children", "train", "import", "first change"])
def test_a_killed_change_loses_nothing(tmp_path: Path, name: str) -> None:
    scenario = kills.Scenario(name, tmp_path)
    for _, point in kills.spread({name: scenario.points}, 2):
        assert scenario.check(point) == [], point


def test_a_kill_that_goes_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = kills.Scenario("rename", tmp_path)
    assert scenario.check("before nothing 1") == ["the point was not reached"]
    scenario.new = scenario.old
    last = next(point for point in reversed(scenario.points) if "COMMIT" in point)
    assert "neither the old nor the new" in scenario.check(last)
