"""LoadedBrain: a brain in memory, its model and its tokenizer; loading it, and sampling text from it."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, TextIteratorStreamer

from aios.brains.brain import Brain
from aios.brains.families import Family, family_of, load_weights, refuse_small_vocabulary, unreadable
from aios.data.tokenizers import tokenizer_fingerprint
from aios.settings.sampling import Sampling
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.hosts.capture import RoutingCounts


@dataclass
class LoadedBrain:
    """A model and its tokenizer, and the brain on disk that they are of."""

    brain: Brain
    model: Any
    tokenizer: Any

    @property
    def family(self) -> Family[Any]:
        """The family of the model."""
        family = family_of(self.model.config.model_type)
        assert family is not None, "no other model is loaded"
        return family

    @property
    def context_length(self) -> int:
        """Tokens the model reads at once."""
        return int(self.model.config.max_position_embeddings)

    @property
    def attached(self) -> list[Any]:
        """The experts attached to it, in order."""
        return list(getattr(self.model, "subbrains", {}).values())

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, no separator added."""
        return encode(self.tokenizer, text)

    def require_tokens(self, text: str) -> list[int]:
        """The ids of a text; :class:`ConfigError` where it has none."""
        if not (ids := self.tokens(text)):
            raise ConfigError("the text is empty; give some.")
        return ids

    def end_within(self, text: str, room: int) -> str:
        """The end of the text, if all of it is more than ``room`` tokens."""
        ids = self.tokens(text)
        return text if len(ids) <= room else str(self.tokenizer.decode(ids[-max(1, room) :]))

    def answer_length(self, wanted: int) -> tuple[int, list[str]]:
        """Tokens of an answer, at most half of what the brain reads; and a line where that is less than wanted."""
        most = self.context_length // 2
        line = f"Answers end after {most} tokens, not {wanted}: the talk so far takes the other half of the context."
        is_default = wanted == Sampling.max_new_tokens  # nobody is surprised that a default is cut
        return min(wanted, most), [line] if wanted > most and not is_default else []

    def sample(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = Sampling.max_new_tokens,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        streamer: Any = None,
    ) -> str:
        """The continuation of ``prompt`` (or of the beginning of a document). Temperature 0 is greedy, ``top_k`` 0 all.

        Raises :class:`ConfigError` for settings outside their range or a prompt the model has no room for.
        """
        Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)  # checks them
        model, separator = self.model, self.tokenizer.eos_token_id
        # Every document followed a separator in training, so every prompt does here.
        ids = [separator, *self.tokens(prompt)]
        room = self.context_length - len(ids)
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens but the model reads {self.context_length}; shorten it."
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
                pad_token_id=separator,
                eos_token_id=separator,
                streamer=streamer,
                **sampling,
            )
        finally:
            model.train(was_training)
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def stream(self, prompt: str, *, seed: int, **settings: Any) -> Generator[str]:
        """Pieces of the continuation as they are made; closing the iterator ends it. Settings as of :meth:`sample`."""
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {seed}; it must be at least 0 and below 2**64.")
        streamer = _Pieces(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                torch.manual_seed(seed)
                self.sample(prompt, streamer=streamer, **settings)
            except InterruptedError:
                streamer.end()  # type: ignore[no-untyped-call]
            except BaseException as error:
                failure.append(error)
                streamer.end()  # type: ignore[no-untyped-call]

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            streamer.closed = True
            thread.join()
        if failure:
            raise failure[0]

    def set_halting(self, halt: str | None = None, segments: int | None = None) -> None:
        """Choose when a token stops, ``halt`` (exact, max) and a cap on ``segments``; the brain's own where None.

        It concerns this model in memory: the brain's configuration stays. Raises :class:`ConfigError` for a model that
        does not halt, or more segments than it was trained with.
        """
        config, inner = self.model.config, self.model.model
        if not self.family.halts:
            if halt not in (None, "exact") or segments is not None:
                raise ConfigError("only an HRM brain halts; leave out --halt and --segments.")
            return
        most = self.family.segments(config)
        if segments is not None and not 1 <= segments <= most:
            raise ConfigError(f"segments is {segments}; this brain was trained with 1 to {most}.")
        inner.halting = config.halting if halt is None else halt
        inner.halt_cap = config.halt_cap if halt is None and segments is None else segments
        inner.reset_segments()

    def segments_per_token(self) -> list[str]:
        """A line on the segments a token took since the last call, of a brain that halts; else none."""
        inner = self.model.model
        if not getattr(inner, "tokens_run", 0):
            return []
        line = f"{inner.mean_segments:.2f} of {self.family.segments(self.model.config)} segments a token"
        inner.reset_segments()
        return [line]

    def export(self, out: Path) -> str:
        """Write a checkpoint of plain transformers into the new folder ``out``; returns its model type.

        Raises :class:`ConfigError` when ``out`` is taken or transformers has no model like this brain's.
        """
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty; choose another folder.")
        if self.attached:
            raise ConfigError(
                "transformers has no experts behind a gate: detach them from this brain before you export it."
            )
        self.family.check_export(self.model.config)
        self.model.export_plain(out)
        self.tokenizer.save_pretrained(out)
        return str(AutoConfig.from_pretrained(out).model_type)


class _Pieces(TextIteratorStreamer):
    """Pieces of text that end the generation once nobody reads them."""

    closed = False

    def put(self, value: Tensor) -> None:
        if self.closed:
            raise InterruptedError
        super().put(value)  # type: ignore[no-untyped-call]


def expert_lines(counts: RoutingCounts) -> list[str]:
    """A line for each layer that routed anything: its experts by share, the most used first."""
    lines = []
    for layer, share in enumerate(counts.share.tolist()):
        order = sorted(range(len(share)), key=lambda expert: -share[expert])
        if share[order[0]] > 0:
            shown = ", ".join(f"{expert} {share[expert]:.0%}" for expert in order[:4] if share[expert] > 0)
            lines.append(f"layer {layer}: experts {shown}")
    return lines


def load_brain(brain: Brain) -> LoadedBrain:
    """The brain in memory, in evaluation mode.

    Raises :class:`CheckpointError` when weights or tokenizer are missing or damaged, or do not belong together.
    """
    folder = brain.weights
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; it is no brain.")
    model, tokenizer = load_weights(folder), load_tokenizer(folder)
    refuse_small_vocabulary(model, len(tokenizer), folder)
    # The run of a checkpoint is two folders up.
    runs = (one for one in (Brain(brain.root, folder), Brain(brain.root, folder.parent.parent)) if one.has_run)
    run = next(runs, None)
    if run is not None and run.run.tokenizer_fingerprint not in (None, tokenizer_fingerprint(folder)):
        raise CheckpointError(
            f"the tokenizer in {folder} is not the one the brain was trained with; put that one back."
        )
    return LoadedBrain(brain, model.eval(), tokenizer)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, no separator added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; :class:`CheckpointError` when it is damaged or ends no document."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise unreadable(folder, error) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer in {folder} has no eos_token; its tokenizer_config.json is not the one.")
    return tokenizer
