"""aios init."""

from pathlib import Path


def init(*, root: Path = Path(), vocab_size: int = 4096, max_bytes: int = 4_000_000, overwrite: bool = False) -> None:
    """Prepare a workspace: sample texts, a tokenizer trained on them, a base model, prepared data, a run.toml.

    Parameters
    ----------
    root
        Workspace folder.
    vocab_size
        Size of the tokenizer.
    max_bytes
        Text per sample corpus.
    overwrite
        Replace files that are there and differ.
    """
    from aios.brains.base import make_workspace
    from aios.cli.quiet import quiet_libraries
    from aios.workspace import Workspace

    quiet_libraries()
    make_workspace(root, vocab_size=vocab_size, max_bytes=max_bytes, overwrite=overwrite)
    print(f"Next: {Workspace(root).command('train', '--config', str(root / 'run.toml'))}")
