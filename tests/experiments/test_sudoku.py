"""The Sudoku experiment is what it says: grids, puzzles of one solution, texts, an arm that runs."""

import torch

from experiments.sudoku import ARMS, CELLS, GIVENS, grids, puzzles, run, text_of


def test_puzzles_have_one_solution_and_texts_show_no_answer():
    solved, classes = grids()
    assert len(solved) == 288
    assert classes.bincount().tolist() == [24] * 12
    rows = puzzles(solved[:50], solved, 20, torch.Generator().manual_seed(0))
    puzzle, answer = rows.split(CELLS, dim=1)
    given = puzzle > 0
    assert (given.sum(dim=1) == GIVENS).all()
    for one, mask, wanted in zip(puzzle, given, answer, strict=True):
        (match,) = solved[(solved[:, mask] == one[mask]).all(dim=1)]
        assert torch.equal(match, wanted)
    tokens, labels = text_of(rows)
    assert torch.equal(tokens[:, -CELLS:], puzzle)
    assert torch.equal(labels[:, -CELLS:], answer)
    assert (labels[:, : CELLS + 1] == -100).all()


def test_every_arm_runs():
    solved, classes = grids()
    for name in ARMS:
        found = run(name, 2, 0, solved, classes)
        assert 0 <= found["exact"] <= found["cells"] <= 1
