"""The model card of a brain: what it is, what it was trained on, how good it measured."""

from pathlib import Path
from typing import Any

from aios.brains.families import FAMILIES
from aios.brains.plan import shape_of
from aios.settings.train import TrainRun
from chronomoe.data.store_info import StoreInfo
from chronomoe.storage import write_text


def write_card(bundle: Path, model: Any, run: TrainRun, info: StoreInfo, results: dict[str, Any]) -> None:
    """Write ``README.md`` into the bundle, from measured results only."""
    rows = [
        f"| {name} | {results['evaluation'].get(name, float('nan')):.4f} | {unigram:.4f} |"
        for name, unigram in results["unigram"].items()
    ]
    domains = [
        f"- {domain.name}: {domain.train.documents:,} documents, {domain.train.tokens:,} tokens "
        f"({domain.near_duplicates_dropped} held-out near-duplicates left out)"
        for domain in info.domains
    ]
    lines = [
        *_opening(bundle.name, run.family, model),
        f"Trained for {results['global_step']:,} steps with seed {run.seed}; settings in run.json.",
        "",
        "## Data",
        "",
        *domains,
        "",
        "## Held-out bits per byte",
        "",
        "| domain | this model | unigram |",
        "|---|---|---|",
        *rows,
        "",
        "A small model trained on little text: it writes plausible words, not facts.",
    ]
    write_text(bundle / "README.md", "\n".join(lines) + "\n")


def write_upcycled_card(bundle: Path, name: str, family: str, model: Any, origin: str) -> None:
    """Write ``README.md`` for a brain that was made from another and not trained since."""
    write_text(bundle / "README.md", "\n".join([*_opening(name, family, model), origin]) + "\n")


def _opening(name: str, family: str, model: Any) -> list[str]:
    total = sum(p.numel() for p in model.parameters())
    return [
        f"# {name}",
        "",
        f"{FAMILIES[family].description}: {shape_of(model.config)}.",
        f"{total:,} parameters, {model.num_active_params:,} active per token.",
    ]
