"""Actions on brains: list, show, rename, delete, export, upcycle."""

from pathlib import Path

from aios.actions import Brain, Confirm, Done, action, refuse
from aios.brains import shelf
from aios.brains.settings import HRMShape


@action()
def list_brains(workspace: Path) -> Done:
    """List brains."""
    found = shelf.list_brains(workspace)
    return Done("" if found else "No brain yet; `aios train` and `aios hrm-hf train-actv1` make them.", found)


@action()
def show(workspace: Path, brain: Brain, /) -> Done:
    """Show a brain.

    Family, size, training, evaluation.
    """
    return Done(value=shelf.show(workspace, brain))


@action()
def rename(workspace: Path, brain: Brain, new: str, /) -> Done:
    """Rename a brain.

    Parameters
    ----------
    new
        Its new name.
    """
    place = shelf.rename(workspace, brain, new)
    return Done(f"Renamed to {place}", {"name": shelf.brain_name(place), "path": str(place)})


@action()
def delete(workspace: Path, brain: Brain, /, *, yes: bool = False, confirm: Confirm = refuse) -> Done:
    """Delete a brain with all its checkpoints.

    Parameters
    ----------
    yes
        Do not ask.
    """
    if not yes and not confirm(f"Delete {brain} and all its checkpoints?"):
        return Done("Kept.")
    place = shelf.delete(workspace, brain)
    return Done(f"Deleted {place}", {"name": shelf.brain_name(place), "path": str(place)})


@action(heavy=True)
def export(workspace: Path, brain: Brain, out: Path, /) -> Done:
    """Export a brain as a plain transformers checkpoint.

    Parameters
    ----------
    out
        New folder.
    """
    model_type = shelf.export(workspace, brain, out)
    return Done(f"Wrote {out}, a {model_type} model of transformers.", {"path": str(out), "model_type": model_type})


@action(heavy=True)
def upcycle(
    workspace: Path,
    brain: Brain,
    new: str,
    /,
    *,
    num_experts: int = HRMShape.num_experts,
    num_experts_per_tok: int = HRMShape.num_experts_per_tok,
    redraw: float = 0.0,
    seed: int = 0,
) -> Done:
    """Make a brain with experts from a dense one.

    The dense one (train-actv1 --no-moe) stays as it is.

    Parameters
    ----------
    new
        Name of the new brain.
    num_experts
        Experts per layer, each a copy of the dense layer.
    num_experts_per_tok
        Experts each token uses (top-k).
    redraw
        Share of the units drawn again in every expert but the first, so that experts differ from the start.
    seed
        Seed of the routers and of the units drawn again.
    """
    from aios.brains.upcycle import upcycle_brain

    made = upcycle_brain(workspace, brain, new, num_experts, num_experts_per_tok, redraw=redraw, seed=seed)
    sizes = f"{made['parameters']:,} parameters, {made['active_parameters']:,} active per token"
    return Done(f"Wrote {made['path']}: {sizes}.\n{made['origin']}", made)
