"""Actions on experts: list, create, train, attach, detach, measure, change, delete."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from aios.actions import BrainName, Confirm, Done, Expert, Flat, Show, Text, action, refuse
from aios.brains.brain import Brain
from aios.experts.change import change
from aios.settings.expert import ExpertTraining
from aios.store.experts import ExpertEntry, Registry
from aios.workspace import Workspace
from chronomoe.errors import ConfigError

Others = Annotated[str, Parameter(help="Ids of further experts.")]


def _against(workspace: Path, against: bool = False, **others: Any) -> bool:
    return against


@action(heavy=_against)
def list_experts(workspace: Path, *, brain: BrainName | None = None, against: bool = False) -> Done:
    """List experts.

    Parameters
    ----------
    brain
        Only those attached to this brain.
    against
        Which gate opens on which domain, by the samples that the experts keep: the share of each domain's tokens at
        which the gate of each expert is open and has the largest margin. Needs --brain.
    """
    entries = Registry(workspace).entries()
    if brain is not None:
        found = Brain.of_workspace(workspace, brain)
        if against:
            from aios.experts.attach import gates_against

            return Done(value=gates_against(found))
        entries = [one for one in entries if found.name in one.attached_to]
        return Done("" if entries else f"No expert is attached to {brain}.", [one.to_json() for one in entries])
    if against:
        raise ConfigError("--against compares the experts of one brain; name it with --brain.")
    listed = [one.to_json() for one in entries]
    return Done("" if listed else "No expert yet; `aios experts create` makes one.", listed)


@action()
def show(workspace: Path, expert: Expert, /) -> Done:
    """Show everything known about an expert."""
    return Done(value=Registry(workspace).get(expert).to_json())


@action()
def create(
    workspace: Path,
    expert: Expert,
    /,
    *,
    name: str = "",
    description: str = "",
    category: str = "",
    goal: list[str] | None = None,
    parent: str | None = None,
) -> Done:
    """Create an expert without weights, to be trained later.

    Its id has up to 64 letters, digits, - and _.

    Parameters
    ----------
    name
        A name for people.
    description
        What it is for.
    category
        A word to sort it by; "general" when not given.
    goal
        Text of a goal; may be given again.
    parent
        Id of the expert it belongs below.
    """
    entry = Registry(workspace).create(
        expert, name=name, description=description, category=category, goals=goal or (), parent=parent
    )
    return _done(entry, f"Created {expert}; it has no weights yet.")


@action(heavy=True)
def train(
    workspace: Path,
    expert: Expert,
    /,
    *,
    settings: Annotated[ExpertTraining, Flat] = ExpertTraining(),  # noqa: B008 (frozen)
    show: Show = print,
) -> Done:
    """Train an expert alone, in a brain that stays as it is.

    Ctrl-C ends it; an earlier version of the expert stays until the new one is complete.
    """
    from aios.experts.train import train_expert

    results = train_expert(workspace, expert, settings, show=show)
    if "entry" not in results:
        return Done(code=130 if results["interrupted"] else 0)
    place, entry = Workspace(workspace), results["entry"]
    after = place.command("experts", "attach", expert, "--brain", settings.brain or "BRAIN")
    if entry.attached_to:  # a brain keeps the version it was given
        brain = entry.attached_to[0]
        steps = [place.command("experts", word, expert, "--brain", brain) for word in ("detach", "attach")]
        after = " && ".join(steps)
    return _done(entry, f"Next: {after}")


@action(heavy=True)
def attach(workspace: Path, expert: Expert, /, *others: Others, brain: BrainName, force: bool = False) -> Done:
    """Attach experts to a brain, each behind its domain gate.

    The brain's own files stay as they are. The gates of all its experts are fitted to one another.

    Parameters
    ----------
    force
        Even if it was trained in another base, when its shapes fit; this is recorded.
    """
    from aios.experts.attach import attach as attach_experts

    experts = expert, *others
    value = [one.to_json() for one in attach_experts(experts, Brain.of_workspace(workspace, brain), force=force)]
    return Done(f"Attached {', '.join(experts)} to {brain}.", value if others else value[0])


@action(heavy=True)
def detach(workspace: Path, expert: Expert, /, *others: Others, brain: BrainName) -> Done:
    """Detach experts from a brain.

    The brain is then what it was before, byte for byte.
    """
    from aios.experts.attach import detach as detach_experts

    experts = expert, *others
    uids = detach_experts(experts, Brain.of_workspace(workspace, brain))
    value = [{"expert_uid": uid, "brain": brain} for uid in uids]
    return Done(f"Detached {', '.join(experts)} from {brain}.", value if others else value[0])


@action(heavy=True)
def gate(workspace: Path, expert: Expert, /, *, brain: BrainName, text: Text) -> Done:
    """Show what the gate of an attached expert makes of a text.

    Its running log-odds at each token, and where it opens.
    """
    from aios.brains.loaded import load_brain
    from aios.experts.use import gate_along

    return Done(value=gate_along(load_brain(Brain.of_workspace(workspace, brain)), expert, text))


@action(heavy=True)
def export(workspace: Path, expert: Expert, out: Path, /) -> Done:
    """Copy the file of an expert, to be imported elsewhere.

    Parameters
    ----------
    out
        New file, or a folder.
    """
    from aios.experts.exchange import export_expert

    place = export_expert(workspace, expert, out)
    return Done(f"Wrote {place}", {"path": str(place)})


@action(heavy=True)
def import_expert(
    workspace: Path, file: Path, /, *, expert_id: Annotated[str | None, Parameter(name="--id")] = None
) -> Done:
    """Import an expert from a file; a damaged or foreign file is refused.

    Parameters
    ----------
    file
        An expert.safetensors.
    expert_id
        Another id than its own.
    """
    from aios.experts.exchange import import_expert as import_file

    entry = import_file(workspace, file, expert_id)
    return _done(entry, f"Imported {entry.expert_id}.")


@action()
def import_registry(workspace: Path, file: Path | None = None, /, *, replace: bool = False) -> Done:
    """Import experts from a registry.json, edited or from elsewhere.

    New experts are entered, known ones become what the file says; experts that it lacks stay.

    Parameters
    ----------
    file
        The file; without one, the workspace's own.
    replace
        Delete the experts that the file lacks; their folders stay.
    """
    found = Registry(workspace).import_file(file, replace_all=replace)
    sentences = [f"Entered {', '.join(found.entered)}." if found.entered else "It brings no new expert."]
    if found.absent:
        sentences.append(f"{', '.join(found.absent)}: {'deleted' if replace else 'not in it, kept'}.")
    if found.refused:
        sentences.append(f"{', '.join(found.refused)}: left out, another expert has this id.")
    return Done(" ".join(sentences), dataclasses.asdict(found))


def _in_a_brain(workspace: Path, expert: str, **arguments: Any) -> bool:
    """Is it attached? Then its brain is changed too, which needs torch."""
    return any(one.attached_to for one in Registry(workspace).entries() if one.expert_id == expert)


@action(heavy=_in_a_brain)
def freeze(workspace: Path, expert: Expert, /) -> Done:
    """Freeze an expert: its weights are not trained."""
    return _done(change(workspace, expert, lambda: Registry(workspace).freeze(expert)), f"Froze {expert}.")


@action(heavy=_in_a_brain)
def unfreeze(workspace: Path, expert: Expert, /) -> Done:
    """Unfreeze an expert: its weights may be trained."""
    return _done(change(workspace, expert, lambda: Registry(workspace).unfreeze(expert)), f"{expert} may be trained.")


@action(heavy=_in_a_brain)
def activate(workspace: Path, expert: Expert, /) -> Done:
    """Activate an expert: tokens may be routed to it."""
    return _done(change(workspace, expert, lambda: Registry(workspace).activate(expert)), f"{expert} is active.")


@action(heavy=_in_a_brain)
def deactivate(workspace: Path, expert: Expert, /) -> Done:
    """Deactivate an expert: no token is routed to it."""
    return _done(change(workspace, expert, lambda: Registry(workspace).deactivate(expert)), f"{expert} is inactive.")


@action()
def set_parent(workspace: Path, expert: Expert, parent: str, /) -> Done:
    """Set an expert's parent.

    Parameters
    ----------
    parent
        Id of the other expert.
    """
    return _done(Registry(workspace).set_parent(expert, parent), f"{expert} is below {parent}.")


@action()
def clear_parent(workspace: Path, expert: Expert, /) -> Done:
    """Clear an expert's parent."""
    return _done(Registry(workspace).clear_parent(expert), f"{expert} has no parent.")


@action(heavy=_in_a_brain)
def rename(workspace: Path, expert: Expert, new: str, /) -> Done:
    """Rename an expert.

    Parameters
    ----------
    new
        Its new id.
    """
    return _done(change(workspace, expert, lambda: Registry(workspace).rename(expert, new)), f"Renamed to {new}.")


@action()
def delete(
    workspace: Path,
    expert: Expert,
    /,
    *,
    children: Literal["refuse", "orphan", "cascade"] = "refuse",
    force: bool = False,
    yes: bool = False,
    confirm: Confirm = refuse,
) -> Done:
    """Delete an expert with its weights.

    Parameters
    ----------
    children
        Experts below it: a reason to refuse, left without a parent, or deleted too.
    force
        Even when it is attached to a brain.
    yes
        Do not ask.
    """
    below = " and all below it" if children == "cascade" else ""
    if not yes and not confirm(f"Delete {expert}{below} with its weights?"):
        return Done("Kept.")
    gone = Registry(workspace).delete(expert, children, force=force)
    return Done(f"Deleted {', '.join(one.expert_id for one in gone)}.", [one.to_json() for one in gone])


@action()
def stats(workspace: Path) -> Done:
    """Count experts, and show how much each is used."""
    return Done(value=Registry(workspace).stats())


def _done(entry: ExpertEntry, sentence: str) -> Done:
    return Done(sentence, entry.to_json())
