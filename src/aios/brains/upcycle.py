"""Upcycling: a new brain with experts from a dense one."""

from typing import Any

from aios.brains.brain import Brain
from aios.brains.card import write_upcycled_card
from aios.brains.families import FAMILIES
from aios.brains.loaded import load_brain
from aios.brains.run_file import RUN_FILE
from aios.data.tokenizers import copy_tokenizer
from chronomoe.errors import ConfigError
from chronomoe.hrm.upcycle import redrawn_units, upcycle
from chronomoe.storage import whole_directory


def upcycle_brain(
    brain: Brain, new: str, num_experts: int, num_experts_per_tok: int, *, redraw: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Write the brain ``new``, whose experts are copies of the layers of ``brain``; see :mod:`chronomoe.hrm.upcycle`.

    Returns its description, with ``upcycled`` (what it was made from and how), ``origin`` (the same in words),
    ``parameters`` and ``active_parameters``. Raises :class:`ConfigError` when the name is taken or the brain not dense.
    """
    family, run = brain.family, brain.run
    made_brain = Brain.free(brain.root, new, family.name)
    if not family.can_be_dense:
        dense = " or ".join(row.title for row in FAMILIES.values() if row.can_be_dense)
        raise ConfigError(
            f"{brain.path.name} is a {family.title}, which has experts already; only an {dense} can be dense."
        )
    parent = load_brain(brain).model
    model = upcycle(parent, num_experts, num_experts_per_tok, redraw=redraw, seed=seed)
    made = {
        "from": brain.name,
        "redraw": redraw,
        "redrawn_units": redrawn_units(parent.config.intermediate_size, redraw),
        "seed": seed,
    }
    origin = _in_words(made, model.config)
    shape = run.run.shape.replace(use_moe=True, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    run = run.replace(
        run=run.run.replace(student_init=None, data=brain.data, shape=shape),
        tokenizer_fingerprint=None,
        data_fingerprint=None,
        published_step=0,
        upcycled=made,
        # Equal outputs, equal bits.
        bits_per_byte=run.bits_per_byte if brain.state == "finished" and not redraw else None,
    )
    with whole_directory(made_brain.path) as work:
        model.save_pretrained(work)
        copy_tokenizer(brain.weights, work)
        write_upcycled_card(work, new, family.name, model, origin)
        run.write_file(work / RUN_FILE)
    counts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": model.num_active_params,
    }
    return {"name": new, **made_brain.describe(), "upcycled": made, **counts, "origin": origin}


def _in_words(made: dict[str, Any], config: Any) -> str:
    words = f"Its {config.num_local_experts} experts a layer are copies of the dense layers of {made['from']}"
    if not made["redraw"]:
        return f"{words}, so its outputs are the same to rounding. Not trained since."
    return (
        f"{words}, {made['redrawn_units']} of {config.intermediate_size} units of each but the first redrawn "
        f"(seed {made['seed']}), so its outputs are not the same. Not trained since."
    )
