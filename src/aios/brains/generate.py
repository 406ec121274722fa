"""Sample text from a brain."""

import math
from collections.abc import Generator
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from aios.settings.sampling import Sampling
from chronomoe.errors import ConfigError
from chronomoe.hosts.capture import RoutingCounts


def sample_text(
    model: Any,
    tokenizer: Any,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 50,
    streamer: Any = None,
) -> str:
    """The continuation of ``prompt`` (or of the beginning of a document). Temperature 0 is greedy, ``top_k`` 0 all.

    Raises :class:`ConfigError` for settings outside their range or a prompt the model has no room for.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ConfigError(
            "temperature must be a number of at least 0, top_p above 0 and at most 1, top_k at least 0, max_new_tokens "
            "at least 1."
        )
    # Every document followed a separator in training, so every prompt does here.
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens but the model reads {model.config.max_position_embeddings}; shorten it."
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    input_ids = torch.tensor([ids], device=model.device)
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    finally:
        model.train(was_training)
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def end_within(tokenizer: Any, text: str, room: int) -> str:
    """The end of the text, if all of it is more than ``room`` tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= room else str(tokenizer.decode(ids[-max(1, room) :]))


def answer_length(model: Any, wanted: int) -> tuple[int, list[str]]:
    """Tokens of an answer in a talk, at most half of what the brain reads; and a line if they are fewer than wanted."""
    most: int = model.config.max_position_embeddings // 2
    told = f"Answers end after {most} tokens, not {wanted}: half of what the brain reads at once is what was said."
    asked = wanted != Sampling.max_new_tokens  # nobody has asked for what is the default
    return min(wanted, most), [told] if asked and wanted > most else []


def set_halting(model: Any, halt: str, segments: int | None) -> None:
    """How a brain that halts shall think; :class:`ConfigError` when asked of one that does not."""
    config = model.config
    if config.model_type != "hrm_actv1":
        if halt != "exact" or segments is not None:
            raise ConfigError("only an HRM brain halts; leave out --halt and --segments.")
        return
    if segments is not None and not 1 <= segments <= config.halt_max_steps:
        raise ConfigError(f"segments is {segments}; this brain was trained with 1 to {config.halt_max_steps}.")
    config.halting, config.halt_cap = halt, segments
    model.model.reset_segments()


def thought(model: Any) -> list[str]:
    """What generating cost in segments since the last call, of a brain that halts."""
    inner = model.model
    if not getattr(inner, "tokens_run", 0):
        return []
    line = f"{inner.mean_segments:.2f} of {model.config.halt_max_steps} segments a token"
    inner.reset_segments()
    return [line]


def expert_lines(counts: RoutingCounts) -> list[str]:
    """A line for each layer that routed anything: its experts by share, the most used first."""
    lines = []
    for layer, share in enumerate(counts.share.tolist()):
        order = sorted(range(len(share)), key=lambda expert: -share[expert])
        if share[order[0]] > 0:
            shown = ", ".join(f"{expert} {share[expert]:.0%}" for expert in order[:4] if share[expert] > 0)
            lines.append(f"layer {layer}: experts {shown}")
    return lines


class _Pieces(TextIteratorStreamer):
    """Pieces of text that end the generation when nobody wants them any more."""

    closed = False

    def put(self, value: torch.Tensor) -> None:
        if self.closed:
            raise InterruptedError
        super().put(value)


def stream_text(model: Any, tokenizer: Any, prompt: str, *, seed: int, **settings: Any) -> Generator[str]:
    """Pieces of the continuation as they are made; closing the iterator ends it. Raises as :func:`sample_text`."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed}; it must be at least 0 and below 2**64.")
    streamer = _Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(seed)
            sample_text(model, tokenizer, prompt, streamer=streamer, **settings)
        except InterruptedError:
            streamer.end()
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        streamer.closed = True
        thread.join()
    if failure:
        raise failure[0]
