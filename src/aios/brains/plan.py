"""What a model and a training run will cost, before it starts."""

import time
from typing import Any

from aios.brains.families import Family, family_of
from aios.settings.train import TrainRun
from chronomoe.data.store_info import DomainInfo, StoreInfo

_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two moments
_MEASURED_TOKENS = 4096


def describe_architecture(model: Any, tokens: int) -> list[str]:
    """Lines on shape, parameters, operations and training memory for micro-batches of ``tokens``."""
    config = model.config
    total, active = sum(p.numel() for p in model.parameters()), model.num_active_params
    memory = total * _BYTES_PER_PARAMETER + _activations(config, tokens)
    return [
        f"model        {shape_of(config)}",
        f"parameters   {total:,} in all, {active:,} active per token",
        f"operations   {_operations(model):,} per token forward, attention aside",
        f"memory       about {memory / 2**30:.2f} GiB to train",
    ]


def shape_of(config: Any) -> str:
    """One line on the shape of a model."""
    blocks = _family(config).describe_blocks(config)
    if not getattr(config, "use_moe", True):
        return f"{blocks}, dense, width {config.hidden_size}, inner width {config.intermediate_size}"
    return (
        f"{blocks} x {config.num_local_experts} experts, top-{config.num_experts_per_tok}, "
        f"width {config.hidden_size}, expert width {config.intermediate_size}"
    )


def _family(config: Any) -> Family[Any]:
    family = family_of(config.model_type)
    assert family is not None, "only models of a family are planned"
    return family


def _operations(model: Any) -> int:
    """Two for each weight that a token is multiplied with, each time it is."""
    config, total = model.config, 0
    counts = _family(config).call_counts(config)
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    for name, parameter in model.named_parameters():
        if "embed" in name or parameter.dim() < 2:
            continue
        times = next((calls for prefix, calls in counts.items() if name.startswith(prefix)), 1)
        total += int(2 * parameter.numel() * times * (share if ".experts." in name else 1))
    if config.tie_word_embeddings:
        total += 2 * config.vocab_size * config.hidden_size
    return total


def _activations(config: Any, tokens: int) -> int:
    """Bytes kept for the backward pass, roughly."""
    top_k = config.num_experts_per_tok if getattr(config, "use_moe", True) else 1
    width = 14 * config.hidden_size + 5 * top_k * config.intermediate_size
    blocks, heads = _family(config).kept_activations(config)
    return int(4 * tokens * (blocks * width + 3 * heads * config.vocab_size))


def describe_plan(model: Any, run: TrainRun, info: StoreInfo) -> list[str]:
    """Lines of the plan: parameters, data, tokens, memory, and time from one measured micro-batch."""
    corpus = sum(domain.train.tokens for domain in info.domains)
    per_step = run.batch_size * run.gradient_accumulation_steps * run.seq_len
    steps = run.max_steps or max(1, run.max_epochs * corpus // per_step)
    seconds = _measure(model, run.batch_size, run.seq_len) * run.gradient_accumulation_steps * steps
    tokens = run.batch_size * run.seq_len
    return [
        *describe_architecture(model, tokens),
        f"data         {corpus:,} tokens in {', '.join(domain.name for domain in info.domains)}",
        f"text         {', '.join(_tokens_per(domain) for domain in info.domains)}",
        f"training     {steps:,} steps x {per_step:,} tokens = {steps * per_step:,} tokens "
        f"({steps * per_step / corpus:.1f} passes)",
        f"time         about {_duration(seconds)} on this machine, evaluation aside",
    ]


def _tokens_per(domain: DomainInfo) -> str:
    """How densely the tokenizer packs the text of a domain: it may suit one script and not another."""
    count, unit = (domain.train if domain.train.tokens else domain.heldout).tokens_per()
    return f"{domain.name} {count:.2f} tokens per {unit}"


def _measure(model: Any, batch_size: int, seq_len: int) -> float:
    """Seconds of forward and backward on one micro-batch of noise, from a part of it that surely fits in memory."""
    import torch

    columns = min(seq_len, _MEASURED_TOKENS)
    rows = min(batch_size, _MEASURED_TOKENS // columns)
    ids = torch.randint(0, model.config.vocab_size, (rows, columns))
    model.train()
    elapsed = 0.0
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        elapsed = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    return elapsed * (batch_size * seq_len) / (rows * columns)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
