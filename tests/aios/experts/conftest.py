"""A workspace with a trained expert."""

import pytest

TRAIN = ("--steps", 4, "--batch-size", 2, "--max-seq-len", 32, "--eval-tokens", 300, "--calibration-windows", 12)


@pytest.fixture
def root(brain):
    return brain.parents[3]


@pytest.fixture
def expert(aios, root, brain):
    """A workspace with a trained expert that is attached to nothing."""
    text = root / "training_data/licences"
    outcome = aios(
        "experts", "train", "laws", "--brain", "straight", "--dataset-file", text, "--root", root, *TRAIN,
        "--default-goal", "Read laws",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert f"Next: aios experts attach laws --brain straight --root {root}" in outcome.out
    return root / "artifacts/experts/laws/expert.safetensors"
