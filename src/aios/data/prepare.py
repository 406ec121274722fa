"""Text sources to prepared data: split, tokenizer, token shards, in two streaming passes.

The first pass chooses the held-out documents and a sample for the tokenizer; the second encodes the training
side and, as it goes by, finds held-out documents it nearly repeats. What is held in memory is the held-out text,
the tokenizer sample and one batch. The output directory appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from aios.data.readers import read_documents
from aios.data.sources import Source, Tally
from aios.data.split import AllHeldOut, DomainSplit, NearDuplicates
from aios.data.tokenizers import (
    TOKENIZER_FILES,
    Encoder,
    check_vocab_size,
    copy_tokenizer,
    find_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from aios.settings.data import PrepareConfig
from chronomoe.data.store_info import DomainInfo, SplitSize, StoreInfo, read_info, write_info
from chronomoe.data.token_store import TokenShardWriter, content_fingerprint
from chronomoe.errors import CheckpointError, ConfigError, DataError
from chronomoe.storage import whole_directory

TOKENIZER_FOLDER = "tokenizer"
_SAMPLE_CHARACTERS = 32_000_000
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was prepared."""

    path: Path
    """The prepared data."""
    info: StoreInfo
    """Its settings and sizes."""
    warnings: tuple[str, ...]
    """What the user should know: no held-out text, undecodable bytes, files skipped."""


@dataclass(kw_only=True)
class _Domain:
    name: str
    split: DomainSplit | AllHeldOut
    sources: list[Source] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    heldout: list[str] = field(default_factory=list)
    sample: list[str] = field(default_factory=list)

    def survey(self, config: PrepareConfig, sample_characters: int) -> None:
        """First pass: choose the held-out documents; keep the first training text for the tokenizer."""
        for source in self.sources:
            for text in read_documents(source, config, self.tally):
                self.split.observe(text)
                if sample_characters > 0:
                    sample_characters -= len(text)
                    self.sample.append(text)
        self.heldout = self.split.finish()

    def training_texts(self, config: PrepareConfig) -> Iterator[str]:
        """Second pass: the training side."""
        known = config.replace(skip_damaged=False)  # what is damaged was found in the first pass
        for source in self.sources:
            for text in read_documents(source, known, Tally(damaged=self.tally.damaged)):
                if (kept := self.split.training_text(text)) is not None:
                    yield kept


def prepare(
    sources: Sequence[Source],
    out: Path,
    config: PrepareConfig | None = None,
    *,
    report: Callable[[str], None] = print,
) -> Report:
    """Write prepared data from text sources into the new directory `out`."""
    config = config or PrepareConfig()
    if config.tokenizer is not None:
        folder = find_tokenizer(config.tokenizer)
        config = config.replace(tokenizer=folder)
        Encoder.open(folder)  # one that cannot be used is refused before any text is read
    domains = _domains(sources, config)
    # Said aloud, it keeps tokenizers from warning when a data loader forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _prepared_directory(out, overwrite=config.overwrite) as stage:
        _survey(domains, config, report)
        encoder = _make_tokenizer(domains, config, stage / TOKENIZER_FOLDER)
        report(f"Tokenizer: {encoder.vocab_size} tokens.")
        info = _write_domains(domains, encoder, config, stage, report)
        write_info(stage, info)
    return Report(path=out, info=info, warnings=_warnings(domains, info))


def _survey(domains: list[_Domain], config: PrepareConfig, report: Callable[[str], None]) -> None:
    """First pass over all domains; when it fails, what was left out until then is reported too."""
    try:
        for domain in domains:
            domain.survey(config, 0 if config.tokenizer else _SAMPLE_CHARACTERS // len(domains))
    except DataError:
        for domain in domains:
            for line in _left_out(domain):
                report(f"Note: {line}")
        raise


def _left_out(domain: _Domain) -> list[str]:
    named = [f"{domain.name}: left out, {sentence}." for sentence in domain.tally.left_out]
    more = domain.tally.left_out_count - len(named)
    return [*named, f"{domain.name}: {more:,} more files are left out."] if more else named


def _domains(sources: Sequence[Source], config: PrepareConfig) -> list[_Domain]:
    if not sources:
        raise ConfigError("No text was named; give at least one source, for example name=path/to/text.")
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("Some sources have a weight and some have none; give every source a weight, or none.")
    domains: dict[str, _Domain] = {}
    for source in sources:
        split: DomainSplit | AllHeldOut = DomainSplit(config.heldout_fraction, config.max_heldout_bytes)
        if source.held_out:
            split = AllHeldOut(config.max_heldout_bytes)
        domains.setdefault(source.name, _Domain(name=source.name, split=split)).sources.append(source)
    # Each domain is a folder beside the tokenizer's, and some file systems ignore case.
    if len({name.casefold() for name in (*domains, TOKENIZER_FOLDER)}) <= len(domains):
        raise ConfigError(f"Domain names must differ in more than case and not be {TOKENIZER_FOLDER!r}; rename one.")
    if sum(source.weight or 0 for source in sources) == 0 and sources[0].weight is not None:
        raise ConfigError("Every source has weight 0; give at least one a positive weight.")
    return list(domains.values())


def _make_tokenizer(domains: list[_Domain], config: PrepareConfig, folder: Path) -> Encoder:
    if config.tokenizer:
        copy_tokenizer(config.tokenizer, folder)
    else:
        # Only the training side: held-out text must not shape the tokenizer either.
        texts = (kept for domain in domains for text in domain.sample if (kept := domain.split.training_text(text)))
        train_tokenizer(texts, config.vocab_size, folder)
    return Encoder.open(folder)


def _write_domains(
    domains: list[_Domain], encoder: Encoder, config: PrepareConfig, stage: Path, report: Callable[[str], None]
) -> StoreInfo:
    dtype = "uint16" if encoder.vocab_size <= 1 << 16 else "uint32"
    duplicates = NearDuplicates([text for domain in domains for text in domain.heldout])
    sizes: dict[tuple[str, str], SplitSize] = {}
    hashes: list[str] = []

    def write(domain: _Domain, split: str, texts: Iterable[str]) -> None:
        (stage / domain.name).mkdir(exist_ok=True)
        writer = TokenShardWriter(stage / domain.name, split, dtype=dtype, separator_id=encoder.separator_id)
        characters = 0
        with writer:
            for batch in _batches(texts):
                writer.append(encoder.encode(batch), [len(text.encode()) for text in batch])
                characters += sum(map(len, batch))
            size, content = writer.close()
        sizes[domain.name, split] = replace(size, characters=characters)
        hashes.append(content)

    for domain in domains:
        write(domain, "train", _observed(domain.training_texts(config), duplicates))
        size = sizes[domain.name, "train"]
        report(f"{domain.name}: {size.tokens:,} training tokens, {size.tokens_per()[0]:.2f} per character.")
    dropped = iter(duplicates.found)
    for domain in domains:
        write(domain, "heldout", [text for text in domain.heldout if not next(dropped)])
    infos = _domain_infos(domains, sizes)
    settings = [tokenizer_fingerprint(stage / TOKENIZER_FOLDER), encoder.vocab_size, encoder.separator_id, dtype]
    return StoreInfo(
        tokenizer_fingerprint=str(settings[0]),
        vocab_size=encoder.vocab_size,
        separator_id=encoder.separator_id,
        dtype=dtype,
        domains=infos,
        fingerprint=content_fingerprint([*settings, [[info.name, info.weight] for info in infos]], hashes),
    )


def _observed(texts: Iterable[str], duplicates: NearDuplicates) -> Iterator[str]:
    for text in texts:
        duplicates.observe(text)
        yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _domain_infos(domains: list[_Domain], sizes: dict[tuple[str, str], SplitSize]) -> tuple[DomainInfo, ...]:
    def weight(domain: _Domain) -> float:
        given = [source.weight for source in domain.sources if source.weight is not None]
        return sum(given) if given else sizes[domain.name, "train"].tokens

    total = sum(map(weight, domains)) or 1.0  # all of it may be held out
    return tuple(
        DomainInfo(
            name=domain.name,
            weight=weight(domain) / total,
            train=sizes[domain.name, "train"],
            heldout=sizes[domain.name, "heldout"],
            near_duplicates_dropped=len(domain.heldout) - sizes[domain.name, "heldout"].documents,
            replaced_bytes=domain.tally.replaced_bytes,
            sources=tuple(source.path for source in domain.sources),
        )
        for domain in domains
    )


def _warnings(domains: list[_Domain], info: StoreInfo) -> tuple[str, ...]:
    found = []
    for domain, stored in zip(domains, info.domains, strict=True):
        if stored.heldout.documents == 0:
            why = "training text nearly repeats all of it" if stored.near_duplicates_dropped else "it is too short"
            found.append(f"{stored.name}: no held-out text, so it cannot be evaluated: {why}.")
        if domain.split.siblings_in_training:
            found.append(f"{stored.name}: it has few texts, so held-out pieces come from texts that are trained on.")
        if stored.replaced_bytes:
            found.append(f"{stored.name}: {stored.replaced_bytes:,} bytes were not UTF-8 and were replaced.")
        found += _left_out(domain)
    return tuple(found)


@contextmanager
def _prepared_directory(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to fill that becomes `out` when the block ends well, and vanishes when it does not."""
    _check_replaceable(out, overwrite)
    with _written(out), whole_directory(out, replace=True) as stage:
        yield stage
        # Preparing takes a while: something else may have come to stand there.
        _check_replaceable(out, overwrite)


@contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.") from error


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = {"data.json", TOKENIZER_FOLDER, *(domain.name for domain in read_info(out).domains)}
        foreign = sorted({path.name for path in out.iterdir()} - ours)
    except (DataError, OSError):
        raise ConfigError(f"{out} exists and is not prepared data; choose another place for it.") from None
    if foreign:
        raise ConfigError(
            f"{out} also holds {foreign[0]}, which is not prepared data; move it or choose another place."
        )
    if not overwrite:
        raise ConfigError(f"{out} already holds prepared data; add --overwrite to replace it.")


def make_tokenizer(
    sources: Sequence[Source], out: Path, config: PrepareConfig | None = None, *, report: Callable[[str], None] = print
) -> Encoder:
    """Train a tokenizer on text, into the new folder `out`: the one that :func:`prepare` makes of the same text."""
    config = config or PrepareConfig()
    check_vocab_size(config.vocab_size)
    domains = _domains(sources, config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "tokenizer.json").is_file():
            raise ConfigError(f"{out} exists and is not a tokenizer; choose another place for it.")
        if foreign := sorted({path.name for path in out.iterdir()} - set(TOKENIZER_FILES)):
            raise ConfigError(f"{out} also holds {foreign[0]}; choose another place for the tokenizer.")
        if not config.overwrite:
            raise ConfigError(f"{out} already holds a tokenizer; add --overwrite to replace it.")
    with _written(out), whole_directory(out, replace=True) as stage:
        _survey(domains, config, report)
        encoder = _make_tokenizer(domains, config, stage)
    for line in (line for domain in domains for line in _left_out(domain)):
        report(f"Note: {line}")
    return encoder
