"""What a training run will cost, before it starts."""

import time
from typing import Any

from aios.brains.settings import Run
from chronomoe.training.token_store import TokenStore

_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two moments
_MEASURED_TOKENS = 4096


def describe_plan(model: Any, run: Run, store: TokenStore) -> list[str]:
    """Lines of the plan: parameters, data, tokens, memory, and time from one measured micro-batch."""
    training, settings = run.training, run.settings
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    corpus = sum(domain.train.tokens for domain in store.info.domains)
    per_step = training.batch_size * training.gradient_accumulation_steps * settings.seq_len
    steps = training.max_steps or max(1, training.max_epochs * corpus // per_step)
    seconds = _measure(model, training.batch_size, settings.seq_len) * training.gradient_accumulation_steps * steps
    tokens = training.batch_size * settings.seq_len
    width = 14 * config.hidden_size + 5 * config.num_experts_per_tok * config.intermediate_size
    activations = 4 * tokens * (config.num_hidden_layers * width + 3 * config.vocab_size)
    return [
        f"model        {config.num_hidden_layers} layers x {config.num_local_experts} experts, top-"
        f"{config.num_experts_per_tok}, width {config.hidden_size}, expert width {config.intermediate_size}",
        f"parameters   {total:,} in all, {model.num_active_params:,} active per token",
        f"data         {corpus:,} tokens in {', '.join(domain.name for domain in store.info.domains)}",
        f"training     {steps:,} steps x {per_step:,} tokens = {steps * per_step:,} tokens "
        f"({steps * per_step / corpus:.1f} passes)",
        f"memory       about {(total * _BYTES_PER_PARAMETER + activations) / 2**30:.2f} GiB",
        f"time         about {_duration(seconds)} on this machine, evaluation aside",
    ]


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
