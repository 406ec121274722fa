"""aios data prepare."""

from pathlib import Path
from typing import Literal


def prepare_command(
    *sources: str,
    out: Path = Path("training_data/prepared"),
    tokenizer: Path | None = None,
    vocab_size: int | Literal["bytes"] = 4096,
    heldout_fraction: float = 0.05,
    field: str | None = None,
    overwrite: bool = False,
) -> None:
    """Turn text into training data: split off held-out documents, tokenize, write token shards.

    Parameters
    ----------
    sources
        Files or folders, each [NAME=]PATH[:WEIGHT]: .txt, .md, .jsonl, .csv, .tsv, .gz, .zip, .parquet, any text.
    out
        Folder to write.
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
    from aios.cli.quiet import quiet_libraries
    from aios.data.prepare import PrepareConfig, prepare
    from aios.data.readers import parse_source
    from chronomoe.errors import ConfigError

    if not sources:
        raise ConfigError("name at least one file or folder of text.")
    quiet_libraries()
    config = PrepareConfig(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        heldout_fraction=heldout_fraction,
        field=field,
        overwrite=overwrite,
    )
    report = prepare([parse_source(source) for source in sources], out, config=config)
    for domain in report.info.domains:
        held_out, dropped = domain.heldout.documents, domain.near_duplicates_dropped
        print(f"{domain.name}: {held_out} documents held out, {dropped} near-duplicates of training text left out.")
    for warning in report.warnings:
        print(f"Note: {warning}")
    print(f"Wrote {out}")
