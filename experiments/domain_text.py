"""The text of experiments/domain_expert.py: who trains, who chooses, who is reported."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aios.data.corpora import write_samples
from aios.data.prepare import prepare
from aios.data.split import NearDuplicates
from aios.settings.data import PrepareConfig
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import IGNORED
from experiments.domain_arms import SEQUENCE

DOMAIN, GENERAL = "licences", ("oratory", "python")


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of whole documents, or of anywhere."""

    inputs: Tensor
    targets: Tensor
    document: Tensor
    """(n,) number of each window's document."""

    @property
    def tokens(self) -> Tensor:
        """(n,) targets that count."""
        return (self.targets != IGNORED).sum(dim=1)

    def select(self, rows: Tensor) -> "Text":
        """Some windows of it."""
        return Text(self.inputs[rows], self.targets[rows], self.document[rows])


def prepare_text(folder: Path, size: int) -> tuple[TokenStore, TokenStore]:
    """The base's domains, and licences in the base's tokens; what nearly repeats training text is not held out."""
    if not (folder / "lic").is_dir():
        sources = write_samples(folder, max_bytes=size, report=lambda line: None)

        def store(names: Sequence[str], out: Path, **settings: Any) -> None:
            chosen = [dataclasses.replace(source, weight=1.0) for source in sources if source.name in names]
            config = PrepareConfig(heldout_fraction=0.2, max_heldout_bytes=size // 2, **settings)
            prepare(chosen, out, config, report=lambda line: None)

        if not (folder / "base").is_dir():
            store(GENERAL, folder / "base", vocab_size=2048)
        store([DOMAIN], folder / "lic", tokenizer=folder / "base/tokenizer")
    return TokenStore.open(folder / "base"), TokenStore.open(folder / "lic")


def split_documents(base: TokenStore, domain: TokenStore, folder: Path) -> dict[str, dict[str, Any]]:
    """Which held-out documents choose and which are reported, and what was found in looking for near-duplicates."""
    file = folder / "documents.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer/tokenizer.json"))
    shards = {name: store.domains[name] for store in (base, domain) for name in store.domains}

    def texts(shard: Any, which: Sequence[int]) -> list[str]:
        return list(tokenizer.decode_batch([shard.document(index).tolist() for index in which]))

    found: dict[str, dict[str, Any]] = {}
    training = {name: texts(one.train, range(len(one.train))) for name, one in shards.items()}
    choosing = {name: texts(one.heldout, range(0, len(one.heldout), 2)) for name, one in shards.items()}
    for name, one in shards.items():
        reported = list(range(1, len(one.heldout), 2))
        mine = texts(one.heldout, reported)

        def repeats(earlier: Sequence[str], mine: list[str] = mine) -> Any:
            search = NearDuplicates(mine)
            for text in earlier:
                search.observe(text)
            return search.found

        own = repeats(training[name])
        others = repeats([text for other in shards if other != name for text in training[other]])
        chosen = repeats([text for part in choosing.values() for text in part])
        kept = [index for index, bad in zip(reported, own | others | chosen, strict=True) if not bad]
        found[name] = {
            "choosing": list(range(0, len(one.heldout), 2)), "reported": kept, "candidates": len(reported),
            "dropped in preparing": one.info.near_duplicates_dropped, "repeat own training text": int(own.sum()),
            "repeat other training text": int(others.sum()), "repeat a choosing document": int(chosen.sum()),
        }  # fmt: skip
    file.write_text(json.dumps(found))
    return found


def documents(store: TokenStore, name: str, which: Sequence[int], most: int) -> Text:
    """Held-out documents, each a sequence of its own; at most ``most`` windows of each, spread evenly."""
    separator, shard = store.info.separator_id, store.domains[name].heldout
    rows: list[tuple[Any, Any, int]] = []
    for index in which:
        targets = shard.document(index).astype(np.int64)
        inputs = np.concatenate([[separator], targets[:-1]])[: len(targets)]
        starts = range(0, len(targets), SEQUENCE)
        for number in sorted({round(x) for x in np.linspace(0, len(starts) - 1, min(most, len(starts)))}):
            part = slice(starts[number], starts[number] + SEQUENCE)
            padding = (0, SEQUENCE - len(targets[part]))
            row = np.pad(inputs[part], padding, constant_values=separator)
            rows.append((row, np.pad(targets[part], padding, constant_values=IGNORED), index))
    inputs_nS, targets_nS, document_n = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Text(inputs_nS, targets_nS, document_n)


def anywhere(windows: Tensor) -> Text:
    """Training windows; nothing is known of their documents."""
    return Text(windows, F.pad(windows[:, 1:], (0, 1), value=IGNORED), torch.arange(len(windows)))
