"""A workspace to start from: sample text, tokenizer, base model configuration, run.toml."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chronomoe
from aios.data.corpora import init_workspace
from chronomoe.storage import write_text

RUN_TOML = """\
# Settings of `aios train --config run.toml`; `aios train --help` explains every name.
name = "small"
max_steps = 3000
batch_size = 8
seq_len = 128
learning_rate = 4e-3
weight_decay = 0.1
log_every_n_steps = 50
eval_every_n_steps = 500
save_every_n_steps = 500
"""


def make_workspace(
    root: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int,
    max_bytes: int,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Write whatever of the workspace is not there yet."""
    init_workspace(
        root,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        max_bytes=max_bytes,
        overwrite=overwrite,
        write_base_config=write_base_config,
        report=report,
    )
    toml = root / "run.toml"
    if overwrite or not toml.exists():
        write_text(toml, RUN_TOML)
        report(f"Wrote {toml}")


def write_base_config(folder: Path, vocab_size: int) -> None:
    """The shape of a brain that a laptop trains in minutes."""
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_dim": 128,
        "intermediate_dim": 256,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "max_seq_length": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    chronomoe.MixtralConfig(**shape, architectures=["ChronovisorMixtralForCausalLM"]).save_pretrained(folder)
