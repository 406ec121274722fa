"""StoreInfo: ``data.json`` of prepared data, what it holds without opening it. Imports nothing heavy."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chronomoe.errors import DataError

FORMAT, VERSION, METADATA = "chronomoe-tokens", 1, "data.json"
_DOMAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """How much one side (train or heldout) of a domain holds."""

    tokens: int
    """Tokens on disk, separators included."""
    documents: int
    """Documents."""
    bytes: int
    """UTF-8 bytes of the documents' text."""
    characters: int = 0
    """Characters of the documents' text; 0 where an earlier version did not count them."""

    def tokens_per(self) -> tuple[float, str]:
        """How many tokens text takes, separators aside, and per what: character, or byte where only these are known."""
        per = self.characters or self.bytes
        return (self.tokens - self.documents) / max(1, per), "character" if self.characters else "byte"


@dataclass(frozen=True, kw_only=True)
class DomainInfo:
    """One named kind of text."""

    name: str
    """The domain's name, also its folder."""
    weight: float
    """Share of training sequences drawn from it; the weights of a store sum to 1."""
    train: SplitSize
    """What is trained on."""
    heldout: SplitSize
    """What is only ever evaluated on."""
    near_duplicates_dropped: int = 0
    """Held-out documents left out because a training document nearly repeats them."""
    replaced_bytes: int = 0
    """Bytes of the source that were not UTF-8 and were read as replacement characters."""
    sources: tuple[str, ...] = ()
    """Where the text came from."""


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """The contents of data.json."""

    tokenizer_fingerprint: str
    """Which tokenizer made the tokens."""
    vocab_size: int
    """One more than the largest token id."""
    separator_id: int
    """The token that ends every document."""
    dtype: str
    """uint16 or uint32."""
    domains: tuple[DomainInfo, ...]
    """The domains, in order."""
    fingerprint: str
    """Hash of every token and setting: equal fingerprints train equally."""


def damaged(place: Path, error: Exception) -> DataError:
    """The error of a file or folder of prepared data that cannot be read."""
    return DataError(f"{place} is damaged ({error}); prepare the data again.")


def write_info(path: Path, info: StoreInfo) -> None:
    """Write data.json; call it last, it is what makes a directory a data set."""
    content = {"format": FORMAT, "version": VERSION, **asdict(info)}
    (path / METADATA).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_info(path: Path) -> StoreInfo:
    """Read and check data.json alone."""
    if not (path / METADATA).is_file():
        raise DataError(f"{path} is not prepared data (it has no {METADATA}); make it with `aios data prepare`.")
    try:
        content = json.loads((path / METADATA).read_text(encoding="utf-8"))
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise DataError(f"{path} was written in another format or version; prepare the data again.")
        domains = tuple(_domain_info(entry) for entry in content.pop("domains"))
        return StoreInfo(**content, domains=domains)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged(path / METADATA, error) from error


def _domain_info(entry: dict[str, Any]) -> DomainInfo:
    if not _DOMAIN_NAME.fullmatch(entry["name"]):
        raise ValueError(f"domain name {entry['name']!r}")
    sizes = {split: SplitSize(**entry[split]) for split in ("train", "heldout")}
    return DomainInfo(**{**entry, **sizes, "sources": tuple(entry["sources"])})
