"""Actions on training data."""

import re
from pathlib import Path
from typing import Annotated

from aios.actions import Done, Flat, Show, action
from aios.data.sources import parse_source, prepare_command
from aios.data.tokenizers import tokenizer_fingerprint
from aios.settings.data import VOCAB_SIZE, PrepareConfig, Reading, VocabSize
from aios.workspace import Workspace
from chronomoe.errors import ConfigError


@action(heavy=True)
def prepare(
    workspace: Path,
    *sources: str,
    out: Path | None = None,
    config: Annotated[PrepareConfig, Flat] = PrepareConfig(),  # noqa: B008 (frozen)
    show: Show = print,
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
    report = prepare_text([parse_source(source) for source in sources], out, config=config, report=show)
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
    after = _train_commands(Workspace(workspace), out, report.info.tokenizer_fingerprint)
    value = {"path": str(out), "domains": domains, "warnings": list(report.warnings), "next": after}
    return Done("\n".join([*lines, f"Wrote {out}", *(f"Next: {command}" for command in after)]), value)


@action(heavy=True)
def tokenizer(
    workspace: Path,
    *sources: str,
    out: Path,
    vocab_size: VocabSize = VOCAB_SIZE,
    reading: Annotated[Reading, Flat] = Reading(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    show: Show = print,
) -> Done:
    """Train a tokenizer on text.

    The one that `aios data prepare` would make of the same text, to be used for more than one data set and in a base
    model.

    Parameters
    ----------
    sources
        Files or folders, as of `aios data prepare`.
    out
        Folder to write.
    vocab_size
        Size of the tokenizer, or "bytes".
    overwrite
        Replace a tokenizer that is already there.
    """
    from aios.data.prepare import make_tokenizer

    if not sources:
        raise ConfigError("name at least one file or folder of text.")
    found = [parse_source(source) for source in sources]
    config = PrepareConfig(vocab_size=vocab_size, overwrite=overwrite, **reading.to_json())
    made = make_tokenizer(found, out, config, report=show)
    place = Workspace(workspace)
    data = place.training_data / found[0].name
    after = [
        place.command("init", "--tokenizer", str(out)),
        prepare_command([(one.name, one.path) for one in found], out, data),
    ]
    lines = [f"Wrote {out}: {made.vocab_size:,} tokens.", *(f"Next: {command}" for command in after)]
    return Done("\n".join(lines), {"path": str(out), "vocab_size": made.vocab_size, "next": after})


def _train_commands(place: Workspace, out: Path, fingerprint: str) -> list[str]:
    """What trains a brain on prepared data, ready to paste; first a base model where there is none."""
    own, settings = str(out / "tokenizer"), place.root / "run.toml"
    name = out.name if out != place.prepared else "small"
    words = ["train", *(["--config", str(settings)] if settings.is_file() else [])]
    words += ["--name", re.sub(r"[^A-Za-z0-9_-]+|^[_-]+", "", name)[:64] or "mine"]
    words += [] if out == place.prepared else ["--data", str(out)]
    if not (place.base_model / "config.json").is_file():
        return [place.command("init", "--tokenizer", own), place.command(*words)]
    same = (place.base_model / "tokenizer.json").is_file() and tokenizer_fingerprint(place.base_model) == fingerprint
    return [place.command(*words, *([] if same else ["--tokenizer", own]))]
