"""Actions on training data."""

from pathlib import Path
from typing import Annotated

from aios.actions import Done, Flat, action
from aios.data.sources import parse_source
from aios.settings.data import PrepareConfig
from aios.workspace import Workspace
from chronomoe.errors import ConfigError


@action(heavy=True)
def prepare(
    workspace: Path,
    *sources: str,
    out: Path | None = None,
    config: Annotated[PrepareConfig, Flat] = PrepareConfig(),  # noqa: B008 (frozen)
) -> Done:
    """Prepare text for training.

    Splits off held-out documents, tokenizes, writes token shards.

    Parameters
    ----------
    sources
        Files or folders, each [NAME=]PATH[:WEIGHT]: .txt, .md, .jsonl, .csv, .tsv, .parquet, any text; in .gz, .bz2,
        .xz, .zst and .zip too.
    out
        Folder to write. [training_data/prepared]
    """
    from aios.data.prepare import prepare as prepare_text

    if not sources:
        raise ConfigError("name at least one file or folder of text.")
    out = out or Workspace(workspace).prepared
    report = prepare_text([parse_source(source) for source in sources], out, config=config)
    domains = {
        one.name: {"held_out": one.heldout.documents, "near_duplicates_dropped": one.near_duplicates_dropped}
        for one in report.info.domains
    }
    lines = [
        f"{name}: {one['held_out']} documents held out, {one['near_duplicates_dropped']} near-duplicates of training "
        "text left out."
        for name, one in domains.items()
    ]
    lines += [f"Note: {warning}" for warning in report.warnings]
    value = {"path": str(out), "domains": domains, "warnings": list(report.warnings)}
    return Done("\n".join([*lines, f"Wrote {out}"]), value)
