"""aios generate."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.brains.sampling import Sampling
from aios.goals.flags import GoalFlags


def generate(
    name: str | None = None,
    *,
    brain: str = "small",
    prompt: str = "",
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),  # noqa: B008 (frozen)
    goals: Annotated[GoalFlags, Parameter(name="*")] = GoalFlags(),  # noqa: B008 (frozen)
    stream: bool = True,
    root: Path = Path(),
) -> None:
    """Sample text from a trained brain.

    Parameters
    ----------
    name
        The same as --brain.
    brain
        Name of a brain, family/name, or the path of a bundle or checkpoint.
    prompt
        Text to continue; without one a document is begun.
    stream
        Print while sampling.
    root
        Workspace folder.
    """
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    from aios.brains.bundle import find_brain, load_brain
    from aios.brains.generate import set_halting, stream_text
    from aios.experts.attach import note_use
    from chronomoe.allocator import keep_freed_memory
    from chronomoe.hosts.capture import RoutingCounts, capture_routing

    keep_freed_memory()
    prompt = prompt.encode("utf-8", "replace").decode()  # a shell may hand over bytes that are no text
    bundle = find_brain(root, name or brain)
    model, tokenizer = load_brain(bundle)
    set_halting(model, sampling.halt, sampling.segments)
    if goals.wanted:
        from aios.goals.use import turn_on_goals, words

        for line in words(turn_on_goals(root, bundle, model, tokenizer, goals)):
            print(line, file=sys.stderr)
    pieces = stream_text(model, tokenizer, prompt, **sampling.settings)
    sys.stdout.write(prompt)
    counts = RoutingCounts(model)
    with capture_routing(model, gate_callback=counts.add_gate):
        for piece in pieces if stream else ["".join(pieces)]:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    note_use(root, model, counts)
