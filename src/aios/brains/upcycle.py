"""Upcycling: a new brain with experts from a dense one."""

from pathlib import Path
from typing import Any

from aios.brains.bundle import data_of, load_brain, model_folder, read_run, write_run
from aios.brains.card import write_upcycled_card
from aios.brains.shelf import describe, existing_brain, free_place
from aios.data.tokenizers import copy_tokenizer
from chronomoe.errors import ConfigError
from chronomoe.storage import whole_directory


def upcycle_brain(
    root: Path, brain: str, new: str, num_experts: int, num_experts_per_tok: int, *, redraw: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Write the brain ``new``, whose experts are copies of the layers of ``brain``; see :mod:`chronomoe.hrm.upcycle`.

    Returns its description, with ``upcycled`` (what it was made from and how), ``origin`` (the same in words),
    ``parameters`` and ``active_parameters``. Raises :class:`ConfigError` when the name is taken or the brain not dense.
    """
    from chronomoe.hrm.upcycle import redrawn_units, upcycle

    bundle, target = existing_brain(root, brain), free_place(root, new, "actv1")
    run, parent = read_run(bundle), describe(bundle)
    if parent["family"] != "actv1":
        raise ConfigError(f"{brain} is a Mixtral, which has experts already; only an HRM ACTv1 can be dense.")
    dense, _ = load_brain(bundle)
    model = upcycle(dense, num_experts, num_experts_per_tok, redraw=redraw, seed=seed)
    made = {
        "from": f"{bundle.parent.name}/{bundle.name}",
        "redraw": redraw,
        "redrawn_units": redrawn_units(dense.config.intermediate_size, redraw),
        "seed": seed,
    }
    origin = _in_words(made, model.config)
    shape = {"use_moe": True, "num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    data = data_of(root, bundle)
    run |= {
        "settings": run["settings"] | {"student_init": None, "data": None if data is None else str(data)},
        "shape": run["shape"] | shape,
        "published_step": 0,
        "upcycled": made,
        # Equal outputs, equal bits.
        "bits_per_byte": run.get("bits_per_byte") if parent["finished"] and not redraw else None,
    }
    with whole_directory(target) as work:
        model.save_pretrained(work)
        copy_tokenizer(model_folder(bundle), work)
        write_upcycled_card(work, new, model, origin)
        write_run(work, run, {})
    counts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": model.num_active_params,
    }
    return {"name": new, **describe(target), "upcycled": made, **counts, "origin": origin}


def _in_words(made: dict[str, Any], config: Any) -> str:
    words = f"Its {config.num_local_experts} experts a layer are copies of the dense layers of {made['from']}"
    if not made["redraw"]:
        return f"{words}, so its outputs are the same to rounding. Not trained since."
    return (
        f"{words}, {made['redrawn_units']} of {config.intermediate_size} units of each but the first drawn anew "
        f"(seed {made['seed']}), so its outputs are not the same. Not trained since."
    )
