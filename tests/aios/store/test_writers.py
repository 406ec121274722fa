"""A small sample of `python -m tests.long.writers`."""

from pathlib import Path

from tests.long import writers


def test_processes_that_write_at_once_leave_both_equal(tmp_path: Path) -> None:
    result = writers.run(tmp_path, 3, 3.0)
    assert result["wrong"] == []
    assert isinstance(result["rounds"], int)
    assert result["rounds"] >= 3
