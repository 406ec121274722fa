"""What is refused of a setting, and in which words."""

from types import SimpleNamespace

import pytest

from chronomoe.errors import ConfigError, require


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0, {"least": 1, "integer": True}, "size is 0; it must be a whole number, at least 1."),
        (1.5, {"least": 1, "integer": True}, "size is 1.5; it must be a whole number, at least 1."),
        (True, {"integer": True}, "size is True; it must be a whole number."),
        ("2", {}, "size is '2'; it must be a finite number."),
        (None, {}, "size is None; it must be a finite number."),
        (float("nan"), {"least": 0}, "size is nan; it must be a finite number, at least 0."),
        (float("inf"), {"above": 0}, "size is inf; it must be a finite number, above 0."),
        (0.0, {"above": 0}, "size is 0.0; it must be a finite number, above 0."),
        (0, {"above": 0, "optional": True}, "size is 0; it must be a finite number, above 0, or None."),
        (1000, {"below": 1000, "integer": True}, "size is 1000; it must be a whole number, below 1,000."),
        (
            1.1,
            {"least": 0, "most": 1, "of": "goal "},
            "goal size is 1.1; it must be a finite number, at least 0 and at most 1.",
        ),
    ],
)
def test_what_does_not_fit(value, bounds, said):
    with pytest.raises(ConfigError) as refused:
        require(SimpleNamespace(size=value), "size", **bounds)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (1, {"least": 1, "integer": True}),
        (1, {"least": 0.5, "most": 1}),
        (-3.5, {}),
        (0.999, {"least": 0, "above": 0.5}),
        (None, {"least": 1, "optional": True}),
    ],
)
def test_what_fits(value, bounds):
    require(SimpleNamespace(size=value, other=1), "size", "other", **{"most": 2} | bounds)
