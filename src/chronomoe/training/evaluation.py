"""Evaluation on held-out text, in bits per byte: comparable between tokenizers and with any compressor."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from chronomoe.data.windows import IGNORED, HeldoutWindows


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: HeldoutWindows, batch_size: int = 8) -> float:
    """Mean code length of the held-out bytes under ``model``, in bits; the model is evaluated as it stands."""
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for inputs, targets in zip(windows.input_ids.split(batch_size), windows.targets.split(batch_size), strict=True):
        logits = model(input_ids=inputs.to(device), use_cache=False).logits.float()
        nats += F.cross_entropy(
            logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return nats.item() / math.log(2) / windows.num_bytes


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean next-token cross-entropy in nats over batches with ``input_ids`` and ``labels`` (not yet shifted)."""
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items() if name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits.float()
        targets = labels_of(batch)[:, 1:].to(device)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        count += int((targets != IGNORED).sum())
    return total.item() / max(1, count)


def labels_of(batch: Mapping[str, Any]) -> torch.Tensor:
    """The batch's labels; without any, its own tokens where they are not padding."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" in batch:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch["input_ids"]


def routed_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """How many tokens of a batch are not padding, scalar."""
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum().cpu()
