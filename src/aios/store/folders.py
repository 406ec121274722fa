"""Folders of experts that change their id or go: set aside first, so that a killed process leaves the old or the new.

Before a change is committed the folder is renamed to ``.aside-<uid>``. Afterwards, or after a kill, the expert that has
this uid gets its folder back, under the id it then has; the folder of a deleted expert is removed.
"""

import re
import shutil
from pathlib import Path

from aios.store.entry import ExpertEntry

_PREFIX = ".aside-"
# Ids of version 1.0 may have dots and be longer; their folders are still ours to move.
_FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def set_aside(home: Path, entry: ExpertEntry) -> None:
    """Rename an expert's folder below ``home`` so that nobody takes it for anybody's, if it has one."""
    folder = home / entry.expert_id
    if _FOLDER.fullmatch(entry.expert_id) and folder.is_dir():
        folder.rename(home / f"{_PREFIX}{entry.expert_uid}")


def folders_set_aside(home: Path) -> list[Path]:
    """Folders that a change has set aside and not given back."""
    return list(home.glob(f"{_PREFIX}*"))


def give_back(home: Path, ids: dict[str, str]) -> None:
    """Give folders that were set aside to the experts with these ids, by uid; remove those of deleted experts."""
    for folder in folders_set_aside(home):
        owner = ids.get(folder.name.removeprefix(_PREFIX))
        if owner is not None and not (home / owner).exists():
            folder.rename(home / owner)
        elif folder.is_symlink():
            folder.unlink()
        else:  # deleted, or trained again since
            shutil.rmtree(folder, ignore_errors=True)
