"""aios brains: list, show, rename, delete, export-hf, upcycle."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Any

from chronomoe.errors import ConfigError


def list_command(*, json: bool = False, root: Path = Path()) -> None:
    """List the brains of the workspace.

    Parameters
    ----------
    json
        Print one JSON array.
    root
        Workspace folder.
    """
    from aios.brains.shelf import list_brains

    brains = list_brains(root)
    if json:
        print(jsonlib.dumps(brains, indent=2))
        return
    if not brains:
        print("No brain yet; `aios train` and `aios hrm-hf train-actv1` make them.")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("brain", "steps", "bits per byte", "MB", "state", box=None, pad_edge=False)
    for brain in brains:
        if "problem" in brain:
            table.add_row(f"{brain['family']}/{brain['name']}", "", "", "", brain["problem"])
            continue
        bits = brain["bits_per_byte"]
        table.add_row(
            f"{brain['family']}/{brain['name']}",
            str(brain["steps"]),
            "" if bits is None else f"{bits:.4f}",
            str(brain["megabytes"]),
            "finished" if brain["finished"] else "in training",
        )
    Console(highlight=False).print(table)


def show_command(brain: str, /, *, json: bool = False, root: Path = Path()) -> None:
    """Show one brain: family, size, training, evaluation.

    Parameters
    ----------
    brain
        Its name, family/name, or path.
    json
        Print one JSON object.
    root
        Workspace folder.
    """
    from aios.brains import shelf

    found = shelf.show(root, brain)
    if json:
        print(jsonlib.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items() if entry is not None)
    return "" if value is None else str(value)


def rename_command(brain: str, new: str, /, *, root: Path = Path()) -> None:
    """Give a brain another name.

    Parameters
    ----------
    brain
        Its name or family/name.
    new
        Its new name.
    root
        Workspace folder.
    """
    from aios.brains.shelf import rename

    print(f"Renamed to {rename(root, brain, new)}")


def delete_command(brain: str, /, *, yes: bool = False, root: Path = Path()) -> None:
    """Delete a brain with all its checkpoints.

    Parameters
    ----------
    brain
        Its name or family/name.
    yes
        Do not ask.
    root
        Workspace folder.
    """
    from aios.brains.shelf import delete

    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("deleting cannot be undone; add --yes to mean it.")
        if input(f"Delete {brain} and all its checkpoints? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Kept.")
            return
    print(f"Deleted {delete(root, brain)}")


def export_command(brain: str, out: Path, /, *, root: Path = Path()) -> None:
    """Write a brain as a plain transformers checkpoint.

    Parameters
    ----------
    brain
        Its name, family/name, or path.
    out
        New folder.
    root
        Workspace folder.
    """
    from aios.brains.shelf import export
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    print(f"Wrote {out}, a {export(root, brain, out)} model of transformers.")


def upcycle_command(
    brain: str,
    new: str,
    /,
    *,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    redraw: float = 0.0,
    seed: int = 0,
    json: bool = False,
    root: Path = Path(),
) -> None:
    """Make a brain with experts from a dense one (train-actv1 --no-moe); that one stays as it is.

    Parameters
    ----------
    brain
        Its name, family/name, or path.
    new
        Name of the new brain.
    num_experts
        Experts per layer, each a copy of the dense layer.
    num_experts_per_tok
        Experts each token uses (top-k).
    redraw
        Share of the units of every expert but the first to draw anew, so that experts differ from the start.
    seed
        Seed of the routers and of what is drawn anew.
    json
        Print one JSON object.
    root
        Workspace folder.
    """
    from aios.brains.upcycle import upcycle_brain
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    made = upcycle_brain(root, brain, new, num_experts, num_experts_per_tok, redraw=redraw, seed=seed)
    if json:
        print(jsonlib.dumps(made, indent=2))
        return
    print(f"Wrote {made['path']}: {made['parameters']:,} parameters, {made['active_parameters']:,} active per token.")
    print(made["origin"])
