"""aios evaluate."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.cli.table import print_table
from aios.goals.flags import GoalFlags


def evaluate(
    name: str | None = None,
    *,
    brain: str = "small",
    text: Path | None = None,
    data: Path | None = None,
    seq_len: int = 128,
    tokens: int = 32768,
    batch_size: int = 8,
    goals: Annotated[GoalFlags, Parameter(name="*")] = GoalFlags(),  # noqa: B008 (frozen)
    json: bool = False,
    root: Path = Path(),
) -> None:
    """Measure a brain in bits per byte of held-out text: alone, with its attached experts, with goals on.

    Parameters
    ----------
    name
        The same as --brain.
    brain
        Name of a brain, family/name, or the path of a bundle or checkpoint.
    text
        File or folder of text to measure on, all of it. [what is held out of the data the brain was trained on]
    data
        Prepared data whose held-out text to measure on.
    seq_len
        Tokens per window.
    tokens
        Tokens per domain, at most.
    batch_size
        Windows at a time.
    json
        Print JSON, for programs.
    root
        Workspace folder.
    """
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    from aios.brains.evaluate import evaluate as measure
    from chronomoe.allocator import keep_freed_memory

    keep_freed_memory()
    found = measure(
        root,
        name or brain,
        goals,
        text=text,
        data=data,
        seq_len=seq_len,
        tokens=tokens,
        batch_size=batch_size,
        show=lambda line: print(line, file=sys.stderr),
    )
    if json:
        print(jsonlib.dumps(found, indent=2))
        return
    titles = {"base": "base alone", "experts": "with experts", "goals": "goals on"}
    rows = []
    for domain, before in found["base"].items():
        cells = [f"{before:.4f}"]
        cells += [
            f"{one[domain]:.4f} ({one[domain] / before - 1:+.1%})" for name, one in found.items() if name != "base"
        ]
        rows.append([domain, *cells])
    print_table(["bits per byte", *(titles[name] for name in found)], rows)
