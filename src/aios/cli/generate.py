"""aios generate."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from aios.goals.flags import GoalFlags


def generate(
    name: str | None = None,
    *,
    brain: str = "small",
    prompt: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 50,
    seed: int = 0,
    halt: Literal["exact", "max"] = "exact",
    segments: int | None = None,
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
    max_new_tokens
        Length of the continuation.
    temperature
        0 takes the likeliest token each time.
    top_p
        Sample among the likeliest tokens that make up this probability.
    top_k
        And among so many of the likeliest; 0 for all.
    seed
        The same seed gives the same text.
    halt
        exact: a token stops thinking where the model says; max: never before the cap (brains that halt).
    segments
        At most this many segments a token (brains that halt).
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

    keep_freed_memory()
    prompt = prompt.encode("utf-8", "replace").decode()  # a shell may hand over bytes that are no text
    bundle = find_brain(root, name or brain)
    model, tokenizer = load_brain(bundle)
    set_halting(model, halt, segments)
    if goals.wanted:
        from aios.goals.use import turn_on_goals, words

        for line in words(turn_on_goals(root, bundle, model, tokenizer, goals)):
            print(line, file=sys.stderr)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    pieces = stream_text(model, tokenizer, prompt, seed=seed, **settings)
    sys.stdout.write(prompt)
    for piece in pieces if stream else ["".join(pieces)]:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    note_use(root, model)
