"""Actions on training data."""

from pathlib import Path
from typing import Literal

from aios.actions import Done, action
from aios.data.readers import parse_source
from aios.workspace import Workspace
from chronomoe.errors import ConfigError


@action(heavy=True)
def prepare(
    workspace: Path,
    *sources: str,
    out: Path | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | Literal["bytes"] = 4096,
    heldout_fraction: float = 0.05,
    field: str | None = None,
    overwrite: bool = False,
) -> Done:
    """Prepare text for training.

    Splits off held-out documents, tokenizes, writes token shards.

    Parameters
    ----------
    sources
        Files or folders, each [NAME=]PATH[:WEIGHT]: .txt, .md, .jsonl, .csv, .tsv, .gz, .zip, .parquet, any text.
    out
        Folder to write. [training_data/prepared]
    tokenizer
        Folder of the tokenizer to use, for example artifacts/hf_implant/base_model; trained on the text when not given.
    vocab_size
        Size of the tokenizer to train, or "bytes".
    heldout_fraction
        Share of the documents kept for evaluation.
    field
        Column or key that holds the text.
    overwrite
        Replace prepared data that is already there.
    """
    from aios.data.prepare import PrepareConfig
    from aios.data.prepare import prepare as prepare_text

    if not sources:
        raise ConfigError("name at least one file or folder of text.")
    out = out or Workspace(workspace).prepared
    config = PrepareConfig(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        heldout_fraction=heldout_fraction,
        field=field,
        overwrite=overwrite,
    )
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
