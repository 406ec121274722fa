"""Ten of the kills of `python -m tests.long.kills`, spread over its scenarios."""

from pathlib import Path

import pytest

from tests.long import kills


@pytest.mark.parametrize("name", ["rename", "delete with children", "train", "import", "first change"])
def test_a_killed_change_loses_nothing(tmp_path: Path, name: str) -> None:
    scenario = kills.Scenario(name, tmp_path)
    for _, point in kills.spread({name: scenario.points}, 2):
        assert scenario.check(point) == [], point


def test_a_result_belongs_to_the_code_it_was_found_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "RESULT", tmp_path / "result.json")
    monkeypatch.setattr(kills, "KILLS", 1)
    given = []
    monkeypatch.setattr(kills, "run", lambda number, folder, known: [given.append(known) or {"a: before x 1": []}])
    assert kills.main([]) == kills.main([]) == 0
    monkeypatch.setattr(kills, "digest_of_source", lambda: "other")
    assert kills.main([]) == 0
    assert given == [{}, {"a: before x 1": []}, {}]


def test_a_kill_that_goes_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = kills.Scenario("rename", tmp_path)
    assert scenario.check("before nothing 1") == ["the point was not reached"]
    scenario.new = scenario.old
    last = next(point for point in reversed(scenario.points) if "COMMIT" in point)
    assert "neither the old nor the new" in scenario.check(last)
