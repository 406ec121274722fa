"""Where things are, below one root folder (see docs/formats/index.md)."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from chronomoe.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def plain_name(name: str) -> str:
    """The same name; :class:`ConfigError` for one that is not a plain word."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a name; use up to 64 letters, digits, - and _, beginning with a letter or digit."
        )
    return name


@dataclass(frozen=True)
class Workspace:
    """Paths of a workspace. Nothing is created by asking for them."""

    root: Path = Path()

    @property
    def base_model(self) -> Path:
        """Tokenizer and configuration new brains start from."""
        return self.root / "artifacts/hf_implant/base_model"

    def refuse_missing_base(self, folder: Path, file: str = "tokenizer.json") -> None:
        """:class:`ConfigError` unless ``folder`` is a base model, which has that ``file``."""
        if not (folder / file).is_file():
            raise ConfigError(f"there is no base model {folder}; `{self.command('init')}` makes one.")

    @property
    def training_data(self) -> Path:
        """Text, and what is prepared from it."""
        return self.root / "training_data"

    @property
    def prepared(self) -> Path:
        """The default prepared data set."""
        return self.training_data / "prepared"

    @property
    def experts(self) -> Path:
        """Experts, each in a folder, and their registry."""
        return self.root / "artifacts/experts"

    @property
    def database(self) -> Path:
        """The database of goals."""
        return self.root / "artifacts/aios.db"

    @property
    def jobs(self) -> Path:
        """What the Subbrains Manager has started."""
        return self.root / "artifacts/jobs"

    def brain(self, name: str, family: str = "mixtral") -> Path:
        """The bundle of one trained model; :class:`ConfigError` for a name that is not a plain word."""
        return self.root / "artifacts/brains" / family / plain_name(name)

    def command(self, *words: str) -> str:
        """An ``aios`` command for this workspace, ready to paste; what follows a word ``--`` stays last."""
        where = () if self.root == Path() else ("--root", str(self.root))
        end = words.index("--") if "--" in words else len(words)
        return shlex.join(["aios", *words[:end], *where, *words[end:]])
