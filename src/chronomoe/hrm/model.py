"""HRMACTv1ForCausalLM: transformers' hrm_text, with experts in every block, segments, and tokens that halt.

    state z_H = 0, z_L = its first value
    for each segment:  z_H <- z_H + e            e: the scaled embedding
        H_cycles times:  L_cycles times:  z_L <- L(z_L + z_H)
                         z_H <- H(z_H + z_L)
        logits from z_H; the halting head reads z_H; the next segment begins from the state, without its gradient

One segment of a dense model is exactly hrm_text. Attention is causal in every call, so no token sees a later one.

Shape suffixes: B batch, S sequence, D hidden size, V vocabulary.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, HrmTextConfig, HrmTextForCausalLM
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.hrm_text.modeling_hrm_text import (
    HrmTextDecoderLayer,
    HrmTextPreTrainedModel,
    HrmTextRMSNorm,
    HrmTextRotaryEmbedding,
    HrmTextStack,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock, MixtralTopKRouter
from transformers.utils.generic import can_return_tuple

from chronomoe.errors import ConfigError
from chronomoe.hrm.config import HRMACTv1Config
from chronomoe.hrm.halting import forced_segments, segment_loss
from chronomoe.hrm.memory import SegmentMemory
from chronomoe.pretrained import SteeredPreTrained
from chronomoe.routing.context import RoutingContext, without_autocast


@dataclass
class HRMModelOutput(BaseModelOutputWithPast):
    """One entry a segment: ``states`` (B, S, D), ``halt_logits`` (B, S), ``active`` (B, S): the token ran it."""

    states: Any = None
    halt_logits: Any = None
    active: Any = None


@dataclass
class HRMOutput(CausalLMOutputWithPast):
    """``segments`` (B, S): how many each token ran. ``states``: as in :class:`HRMModelOutput`."""

    segments: Tensor | None = None
    states: Any = None


class HRMBlock(HrmTextDecoderLayer):
    """A block of hrm_text, with a mixture of experts for its feed-forward layer where the configuration says so."""

    _can_checkpoint_with_cache = True  # our memories answer a recomputed layer as they did the first time

    def __init__(self, config: HRMACTv1Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.use_moe:
            self.mlp: nn.Module = MixtralSparseMoeBlock(config)  # type: ignore[assignment]


class HRMStack(HrmTextStack):
    """Blocks of one level."""

    def __init__(self, config: HRMACTv1Config, num_layers: int) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList([HRMBlock(config, index) for index in range(num_layers)])
        self.final_norm = HrmTextRMSNorm(eps=config.rms_norm_eps)


class HRMPreTrainedModel(HrmTextPreTrainedModel):
    """Initialisation: hrm_text's, with the experts of Mixtral and a head that does not halt at first."""

    config: HRMACTv1Config
    config_class = HRMACTv1Config
    _no_split_modules = ["HRMBlock"]  # noqa: RUF012
    _can_record_outputs: Any = None
    _can_set_experts_implementation = SteeredPreTrained._can_set_experts_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        std = self.config.initializer_range
        if isinstance(module, MixtralExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MixtralTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, HRMACTv1Model):
            init.zeros_(module.z_L_init)
            if module.halt_head is not None:
                init.zeros_(module.halt_head.weight)
                init.constant_(module.halt_head.bias, self.config.halt_bias)


class HRMACTv1Model(HRMPreTrainedModel):
    """Embeddings, the two stacks and the halting head; see the module's text for the recurrence."""

    def __init__(self, config: HRMACTv1Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        learned = config.pos_encodings == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.rotary_emb = HrmTextRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.L_module = HRMStack(config, config.l_layers)
        self.H_module = HRMStack(config, config.h_layers)
        self.z_L_init = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        self.halt_head = nn.Linear(config.hidden_size, 1) if config.halt_max_steps > 1 else None
        self.segments_run, self.tokens_run = 0.0, 0.0
        """Sums over all evaluation forwards, until :meth:`reset_segments`."""
        self.halting, self.halt_cap = config.halting, config.halt_cap
        """As in the configuration; to be changed at run time, which leaves what is saved as it was."""
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def routing_depths(self) -> int:
        """Times a layer is called in one forward, at most."""
        return self.config.halt_max_steps * self.config.H_cycles * self.config.L_cycles

    def reset_segments(self) -> None:
        """Count from here on."""
        self.segments_run = self.tokens_run = 0.0

    @property
    def mean_segments(self) -> float:
        """Segments per token in evaluation and generation since :meth:`reset_segments`."""
        return float(self.segments_run) / max(1.0, float(self.tokens_run))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing_context: RoutingContext | None = None,
        **kwargs: Any,
    ) -> HRMModelOutput:
        """``input_ids`` (B, S) or ``inputs_embeds`` (B, S, D), not scaled; ``attention_mask`` (B, past + S)."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give exactly one of input_ids and inputs_embeds.")
        scale: Any = config.embedding_scale
        e_BSD = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds) * scale
        if use_cache is None:
            use_cache = config.use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        real_BS = _real_tokens(attention_mask, e_BSD)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, e_BSD)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=e_BSD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=None if config.window_size is None else sliding_window_overlay(config.window_size),
        )
        cos, sin = self.rotary_emb(e_BSD, position_ids)
        if self.embed_positions is not None:
            if int(position_ids.max()) >= config.max_position_embeddings:
                raise ConfigError(
                    f"the text is longer than the {config.max_position_embeddings} positions that were learned."
                )
            e_BSD = e_BSD + self.embed_positions(position_ids) * scale
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        limit = config.halt_max_steps
        if not self.training and self.halt_cap is not None:
            limit = max(1, min(limit, self.halt_cap))
        halts = self.halting == "exact" and limit > 1
        memory = SegmentMemory(past_key_values, config.slots_per_segment, halts=halts)
        call = {"attention_mask": mask, "position_embeddings": (cos, sin), "past_key_values": memory, **kwargs}
        output = self._segments(e_BSD, real_BS, limit, memory, call, routing_context)
        output.past_key_values = past_key_values
        return output

    def _segments(
        self,
        e_BSD: Tensor,
        real_BS: Tensor,
        limit: int,
        memory: SegmentMemory,
        call: dict[str, Any],
        context: RoutingContext | None,
    ) -> HRMModelOutput:
        config, halts = self.config, memory.halts
        forced_BS = None
        if halts and self.training and config.halt_exploration > 0:
            forced_BS = forced_segments(real_BS, limit, config.halt_exploration)
        z_H, z_L = torch.zeros_like(e_BSD), self.z_L_init.to(e_BSD.dtype).expand_as(e_BSD)
        active_BS = torch.ones_like(real_BS)
        states, halt_logits, active = [], [], []
        for segment in range(limit):
            if segment and halts:
                memory.halted[segment] = ~active_BS
            routed = None if context is None else context.restricted(active_BS.flatten() if segment else None)
            new_H, new_L = self._segment(e_BSD, z_H, z_L, segment, {**call, "routing_context": routed})
            if segment and halts:
                new_H = torch.where(active_BS.unsqueeze(-1), new_H, z_H)
                new_L = torch.where(active_BS.unsqueeze(-1), new_L, z_L)
            states.append(new_H)
            active.append(active_BS)
            if self.halt_head is not None:
                # In fp32 and without gradient into the model: the head watches.
                with without_autocast(new_H):
                    head = self.halt_head.weight.float(), self.halt_head.bias.float()
                    halt_logits.append(F.linear(new_H.detach().float(), *head).squeeze(-1))
            z_H, z_L = new_H.detach(), new_L.detach()
            if halts and segment + 1 < limit:
                stops_BS = (halt_logits[-1] > 0) | ~real_BS
                if forced_BS is not None:
                    stops_BS &= forced_BS <= segment + 1
                active_BS = active_BS & ~stops_BS
                if not self.training and not bool(active_BS.any()):
                    memory.carry_to(segment + 1, limit - 1)
                    break
        if not self.training:
            self.segments_run += float((torch.stack(active).sum(dim=0) * real_BS).sum())
            self.tokens_run += float(real_BS.sum())
        return HRMModelOutput(
            last_hidden_state=states[-1],
            states=tuple(states),
            halt_logits=tuple(halt_logits),
            active=tuple(active),
        )

    def _segment(
        self, e_BSD: Tensor, z_H: Tensor, z_L: Tensor, segment: int, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        slot = segment * config.slots_per_segment
        z_H = z_H + e_BSD
        for cycle in range(config.H_cycles):
            last_cycle = cycle == config.H_cycles - 1
            if cycle and last_cycle and config.grad_mode != "all":
                # What came before has no gradient; for the embedding's take it for the identity, its residual path.
                z_H = z_H + (e_BSD - e_BSD.detach())
            for low in range(config.L_cycles):
                last = last_cycle and low == config.L_cycles - 1
                with self._with_gradient(last=last, last_cycle=last_cycle):
                    z_L = self.L_module(z_L + z_H, cycle_offset=slot, **call)
                slot += config.l_layers
            with self._with_gradient(last=last_cycle, last_cycle=last_cycle):
                z_H = self.H_module(z_H + z_L, cycle_offset=slot, **call)
            slot += config.h_layers
        return z_H, z_L

    def _with_gradient(self, *, last: bool, last_cycle: bool) -> Any:
        mode = self.config.grad_mode
        carries = mode == "all" or (last_cycle and mode == "last_cycle") or last
        return nullcontext() if carries else torch.no_grad()


def _real_tokens(attention_mask: Tensor | None, e_BSD: Tensor) -> Tensor:
    """(B, S) bool: not padding."""
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.ones(e_BSD.shape[:2], dtype=torch.bool, device=e_BSD.device)
    return attention_mask[:, -e_BSD.shape[1] :].bool()


def _positions(attention_mask: Tensor | None, past: int, e_BSD: Tensor) -> Tensor:
    """(B, S), counted from the first token that is not padding."""
    length = e_BSD.shape[1]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + length, device=e_BSD.device).unsqueeze(0)
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


class HRMACTv1ForCausalLM(SteeredPreTrained, HRMPreTrainedModel, GenerationMixin):
    """The language model. With experts it is steered: ``model.steering`` and ``model.controller``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HRMACTv1Config) -> None:
        dispatch = config._experts_implementation or "sorted"
        super().__init__(config)
        self.model = HRMACTv1Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_terms: dict[str, Tensor] = {}
        """``ce``, ``bce_halt`` and ``used_segments`` of the latest training loss."""
        self.post_init()  # type: ignore[no-untyped-call]
        if config.use_moe:
            self.steer(dispatch)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> HRMOutput:
        """Logits (B, S, V) of each token's last segment. In training the loss is that of all segments, and of halting.

        ``labels`` (B, S) are shifted here, -100 is ignored; ``shift_labels`` are shifted already.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        labels = shift_labels if labels is None else labels
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        if labels is not None and self.training:
            loss, logits = self._training_loss(output, _shifted(labels, shift_labels), num_items_in_batch)
            logits = logits[:, keep]
        else:
            logits = self.lm_head(output.last_hidden_state[:, keep])
            if labels is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.vocab_size,
                    shift_labels=shift_labels,
                    num_items_in_batch=num_items_in_batch,
                )
        return HRMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            segments=torch.stack(output.active).sum(dim=0),
            states=output.states,
        )

    def export_plain(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint of transformers' hrm_text, which knows one segment, dense blocks and equal stacks."""
        ours = self.config.to_dict()
        names = [name for name in HrmTextConfig().to_dict() if name in ours and name not in ("model_type", "dtype")]
        plain = HrmTextConfig(**{name: ours[name] for name in names})
        plain.architectures = ["HrmTextForCausalLM"]
        plain.dtype = self.dtype
        with torch.device("meta"):
            skeleton: Any = HrmTextForCausalLM(plain)
            skeleton.to(self.dtype)
        skeleton.generation_config = self.generation_config
        skeleton.save_pretrained(path, state_dict=self.state_dict())

    def _training_loss(
        self, output: HRMModelOutput, targets_BS: Tensor, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        losses = []
        for state in output.states:
            logits = self.lm_head(state)
            losses.append(
                F.cross_entropy(logits.float().flatten(0, 1), targets_BS.flatten(), reduction="none").view_as(
                    targets_BS
                )
            )
        halt_logits = output.halt_logits or tuple(torch.zeros_like(loss) for loss in losses)
        found = segment_loss(
            torch.stack(losses),
            torch.stack(halt_logits),
            torch.stack(output.active),
            targets_BS != -100,
            self.config.halt_gain,
            num_items,
        )
        self.loss_terms = {
            "ce": found.ce.detach(), "bce_halt": found.bce_halt.detach(), "used_segments": found.used_segments.detach(),
        }  # fmt: skip
        return found.ce + found.bce_halt, logits


def _shifted(labels: Tensor, shift_labels: Tensor | None) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
