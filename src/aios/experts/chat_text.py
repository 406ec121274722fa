"""Conversations of a base with itself: its chat template and its own answers, for the calibration of gates."""

from typing import Any

import torch
from torch import Tensor

CONVERSATIONS = 20
_QUESTION, _ANSWER = 24, 32
"""Tokens of the base's text that are put as a question, and of the answer."""


@torch.no_grad()
def chat_windows(model: Any, tokenizer: Any, text: Tensor) -> Tensor | None:
    """Windows (n, S) of conversations in which ``model`` answers the beginnings of its own text (m, S).

    None where the tokenizer has no chat template, or it makes less than a window of them.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    stream: list[int] = []
    for row in text[:: max(1, len(text) // CONVERSATIONS)][:CONVERSATIONS]:
        message = {"role": "user", "content": tokenizer.decode(row[:_QUESTION], skip_special_tokens=True)}
        asked: Any = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
        ids = torch.tensor([asked["input_ids"]], device=model.device)
        room = model.config.max_position_embeddings - ids.shape[1]
        if room > 0:
            answered = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=min(_ANSWER, room),
                pad_token_id=tokenizer.eos_token_id,
            )
            stream += answered[0].tolist()
    length = text.shape[1]
    windows = torch.tensor(stream[: len(stream) // length * length], dtype=torch.int64).view(-1, length)
    return windows if len(windows) else None
