"""Train one expert alone in a brain, and enter it in the registry: `aios experts train`, `train-actv1 --expert-id`."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain, load_tokenizer
from aios.data.prepared import prepared_with
from aios.data.tokenizers import tokenizer_fingerprint
from aios.experts.chat_text import chat_windows
from aios.experts.report import DOMAIN, about_the_gate, warnings
from aios.goal_text import goal_text
from aios.settings.expert import ExpertTraining
from aios.store.entry import WEIGHTS, ExpertEntry, expert_folder, making, now, weights_path
from aios.store.experts import Registry
from aios.store.goals import Goals
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import HeldoutWindows, PackedDataset, heldout_windows, training_windows
from chronomoe.errors import CheckpointError, ConfigError, DataError, TrainingError
from chronomoe.experts import training
from chronomoe.experts.attachment import attach_expert, detach_expert
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.file import base_of, save_expert
from chronomoe.hosts.attach import moe_layers
from chronomoe.training.config import TrainingConfig
from chronomoe.training.evaluation import bits_per_byte
from chronomoe.training.trainer import ChronoMoETrainer

Show = Callable[[str], None]
Bits = dict[str, float]
"""Held-out bits per byte by domain."""
GENERAL, CHAT = "general", "chat"
_START_WINDOWS = 32
"""Windows of the domain on which the base's most used expert is found."""


@dataclass(frozen=True)
class Base:
    """What an expert is trained in: a model, the folder of its tokenizer, the data it was trained on if it is there."""

    model: Any
    tokenizer: Path
    data: Path | None = None

    @classmethod
    def of(cls, brain: Brain) -> "Base":
        """A brain of a workspace, or a checkpoint."""
        return cls(load_brain(brain).model, brain.weights, brain.data)


def train_expert(
    root: Path,
    expert_id: str,
    settings: ExpertTraining,
    base: Base | None = None,
    show: Show = print,
    *,
    use_cpu: bool = False,
) -> dict[str, Any]:
    """Train ``expert_id`` and write artifacts/experts/<id>/expert.safetensors and the registry.

    ``base`` is in place of ``settings.brain``; ``use_cpu`` leaves accelerators alone. Returns the trainer's results and
    the ``entry`` of the registry; a run that was interrupted leaves an earlier version as it was and has no entry.

    Raises :class:`ConfigError` for settings that cannot work or a frozen expert, :class:`DataError` for text that
    cannot be used.
    """
    expert_folder(root, expert_id)  # an id that is no name is refused first
    Registry(root).refuse_foreign_weights(expert_id)
    known = _entry(root, expert_id)
    if known is not None and known.is_frozen:
        raise ConfigError(f"expert {expert_id} is frozen; `aios experts unfreeze {expert_id}` lets it be trained.")
    if settings.dataset_file is None:
        raise ConfigError("name the text of the domain with --dataset-file.")
    Goals(root).all()  # goals that cannot be read are found out before the training, not after
    if base is None:
        if settings.brain is None:
            raise ConfigError("name the brain the expert is trained in with --brain.")
        base = Base.of(Brain.at(root, settings.brain))
    for uid in list(getattr(base.model, "subbrains", {})):
        detach_expert(base.model, uid)  # an expert learns in the base alone
    with making(root, expert_id), _stores(settings, base, show) as (domain, general):
        task = _Task(root, expert_id, settings, known, base.model, domain, general, base.tokenizer, show, use_cpu)
        expert = task.new_expert()
        before = task.bits_per_byte()
        show(f"Base, bits per byte: {_words(before)}.")
        results = task.train(expert)
        if not results["finished"]:
            show(f"Stopped at step {results['global_step']}; nothing was written, an earlier version stays as it is.")
            return results
        calibration, measured = task.calibrate(expert)
        metrics = {"before": before, **measured, "unit": "bits per byte"}
        show(
            f"With the expert behind its gate: {_words(measured['after'])}; "
            f"always open: {_words(measured['always_open'])}."
        )
        for line in [*about_the_gate(calibration), *warnings(expert_id, calibration, metrics)]:
            show(line)
        return results | {"entry": task.enter(expert, calibration, metrics, results["global_step"])}


class _Task:
    """The training of one expert, step by step."""

    def __init__(
        self,
        root: Path,
        expert_id: str,
        settings: ExpertTraining,
        known: ExpertEntry | None,
        model: Any,
        domain: TokenStore,
        general: TokenStore | None,
        tokenizer: Path,
        show: Show,
        use_cpu: bool,
    ) -> None:
        self.use_cpu = use_cpu
        self.root, self.expert_id, self.settings, self.known = root, expert_id, settings, known
        self.model, self.domain, self.general, self.show = model, domain, general, show
        self.folder = expert_folder(root, expert_id)
        self.length = min(settings.max_seq_len, model.config.max_position_embeddings)
        self.layers = moe_layers(model)
        if not self.layers:
            raise ConfigError(
                "this brain has no experts to train another one beside; `aios brains upcycle` gives it some."
            )
        self.base = base_of(model)
        self.windows = self._windows(domain, settings.calibration_windows)[domain.info.domains[0].name]
        """(n, S) of the domain."""
        self.general_windows = {} if general is None else self._windows(general, 2 * settings.calibration_windows)
        """(2 n, S) of each general domain: half for the fit of the gate, half for its threshold."""
        self.chat = (
            None
            if general is None
            else chat_windows(model, load_tokenizer(tokenizer), torch.cat(list(self.general_windows.values())))
        )
        """(n, S) of conversations, where the tokenizer has a chat template."""
        self.heldout: dict[str, HeldoutWindows] = {}
        for store, name in [(domain, DOMAIN)] + ([] if general is None else [(general, None)]):
            for one in store.info.domains if settings.eval_tokens else ():
                if one.heldout.documents:
                    windows = heldout_windows(store, one.name, self.length, settings.eval_tokens)
                    self.heldout[name or one.name] = windows

    def new_expert(self) -> DomainExpert:
        """The expert as its training starts."""
        model, settings = self.model, self.settings
        gate_layers = range(min(2, len(self.layers)))
        # The gate opens for no token before it has read its layers; a recurrent model comes by its first layers again.
        is_recurrent = getattr(model.model, "routing_depths", 1) > 1
        expert = DomainExpert(
            self.expert_id,
            hidden_size=model.config.hidden_size,
            width=self.layers[0].experts.intermediate_dim,
            layers=range(0 if is_recurrent else gate_layers[-1], len(self.layers)),
            act=model.config.hidden_act,
            gate_layers=gate_layers,
            uid=None if self.known is None else self.known.expert_uid,
        )
        model.eval()
        training.begin(expert, model, self.windows[:_START_WINDOWS], settings.redraw, settings.seed)
        return expert

    def bits_per_byte(self) -> Bits:
        """Of the held-out text of the domain and of each general domain, of the model as it stands."""
        batch = self.settings.batch_size
        return {name: round(bits_per_byte(self.model, one, batch), 5) for name, one in self.heldout.items()}

    def train(self, expert: DomainExpert) -> dict[str, Any]:
        """Train the expert in the frozen model; the trainer's results."""
        with training.trainee(self.model, expert, self.settings.anchor_weight) as trainee:
            results = _run(
                trainee, self.domain, self.general, self.length, self.folder, self.settings, self.show, self.use_cpu
            )
        expert.eval()
        return results

    def calibrate(self, expert: DomainExpert) -> tuple[dict[str, Any], dict[str, Bits]]:
        """Fit the gate and set its threshold; what the calibration says, and bits per byte ``after``, ``always_open``.

        Raises :class:`TrainingError` where the text's likelihood is not finite with the expert.
        """
        model, settings, half = self.model, self.settings, len(self.windows)
        if self.general_windows:
            expert.gate.leak.fill_(settings.gate_memory)
            training.fit_gate(
                expert,
                model,
                self.windows,
                {name: windows[:half] for name, windows in self.general_windows.items()}
                | ({} if self.chat is None else {CHAT: self.chat}),
                seed=settings.seed,
            )
        # Text that the fit has not seen, so that the threshold is strict enough.
        unseen = {name: windows[half:] for name, windows in self.general_windows.items()}
        unseen |= {} if self.chat is None else {CHAT: self.chat}
        attach_expert(model, expert)
        try:
            if unseen:
                calibration = training.calibrate(model, expert, unseen, settings.false_alarm, settings.harm_kl)
                assert expert.record is not None
                own = expert.gate.odds_of(expert.record.domain)
                calibration["recall"] = float((own > expert.gate.threshold).float().mean())
            else:
                # Without general text there is nothing to tell the domain from: only a goal's prior opens the gate.
                expert.gate.threshold.fill_(0)
                calibration = {"note": "no general text: the gate has no evidence, only a goal opens it"}
            after = self.bits_per_byte()
            expert.forced = True
            always_open = self.bits_per_byte()
            expert.forced = None
        finally:
            detach_expert(model, expert.uid)
        if not settings.domain_record:
            expert.record = None
        if not all(map(math.isfinite, [*after.values(), *always_open.values(), expert.mean_mixing])):
            raise TrainingError(
                f"expert {self.expert_id} came to nothing: with it the text's likelihood is not finite. Lower --lr; "
                "nothing was written, an earlier version stays as it is."
            )
        return calibration, {"after": after, "always_open": always_open}

    def enter(
        self, expert: DomainExpert, calibration: dict[str, Any], metrics: dict[str, Any], steps: int
    ) -> ExpertEntry:
        """Write the expert's file and its entry in the registry.

        Raises :class:`CheckpointError` where another process changed the expert in the meantime.
        """
        settings, file = self.settings, self.folder / WEIGHTS
        goals = () if settings.default_goal is None else (goal_text(settings.default_goal),)
        config = {
            "hidden_size": expert.hidden_size, "intermediate_size": expert.width, "lr": settings.lr,
            "steps": settings.steps, "batch_size": settings.batch_size, "max_seq_len": self.length,
            "redraw": settings.redraw, "anchor_weight": settings.anchor_weight, "seed": settings.seed,
        }  # fmt: skip
        tokenizer, general = self.domain.info.tokenizer_fingerprint, self.general
        header = {
            "created": now(),
            "base": self.base,
            "tokenizer_fingerprint": tokenizer,
            "training": config,
            "calibration": calibration,
            "metrics": metrics,
            "goals": list(goals),
            "data": {
                "domain": self.domain.info.fingerprint,
                "general": None if general is None else general.info.fingerprint,
            },
        }
        current = _entry(self.root, self.expert_id)
        if _uid(current) != _uid(self.known) or (current is not None and current.is_frozen):
            raise CheckpointError(
                f"expert {self.expert_id} was frozen, renamed, deleted or made by another process while it was "
                "trained; nothing was written."
            )
        save_expert(expert, header, file)
        registry = Registry(self.root)
        assert settings.dataset_file is not None
        registry.upsert(
            ExpertEntry(
                expert_id=self.expert_id,
                expert_uid=expert.uid,
                description=f"Expert trained on {settings.dataset_file.name}",
                goals=goals,
                training_datasets=(str(settings.dataset_file),),
                performance_metrics=metrics,
                checkpoint_path=weights_path(self.expert_id),
                base_fingerprint=self.base["fingerprint"],
                tokenizer_fingerprint=tokenizer,
                training_config=config,
            )
        )
        tokens = steps * settings.batch_size * self.length
        entry = registry.record_use(self.expert_id, tokens, expert.mean_mixing)
        self.show(f"Wrote {file}")
        return entry

    def _windows(self, store: TokenStore, count: int) -> dict[str, Tensor]:
        return training_windows(store, self.length, count, self.settings.seed + 1)


def _entry(root: Path, expert_id: str) -> ExpertEntry | None:
    return {entry.expert_id: entry for entry in Registry(root).entries()}.get(expert_id)


def _uid(entry: ExpertEntry | None) -> str | None:
    return None if entry is None else entry.expert_uid


def _run(
    trainee: Any,
    domain: TokenStore,
    general: TokenStore | None,
    length: int,
    folder: Path,
    settings: ExpertTraining,
    show: Show,
    use_cpu: bool,
) -> dict[str, Any]:
    count = settings.steps * settings.batch_size
    data: Any = PackedDataset(domain, length, settings.seed, count)
    if general is not None and settings.anchor_weight > 0:
        data = training.WithAnchor(data, PackedDataset(general, length, settings.seed, count))
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".training-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a training that was killed
    with TemporaryDirectory(dir=folder, prefix=".training-") as place:
        config = TrainingConfig(
            checkpoint_dir=place,
            max_steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.lr,
            weight_decay=0.0,
            log_every_n_steps=min(50, max(1, settings.steps // 20)),
            eval_every_n_steps=settings.steps,
            save_every_n_steps=settings.steps,
            log_file=str(settings.log_file or folder / "metrics.jsonl"),
            seed=settings.seed,
        )
        loader = DataLoader(data, batch_size=settings.batch_size)
        trainer = ChronoMoETrainer(trainee, config, loader, show=show, use_cpu=use_cpu)
        return trainer.train()


@contextmanager
def _stores(settings: ExpertTraining, base: Base, show: Show) -> Iterator[tuple[TokenStore, TokenStore | None]]:
    """The domain's text and the general text, tokenized as the base was."""
    with TemporaryDirectory() as place:
        assert settings.dataset_file is not None
        domain = prepared_with(base.tokenizer, settings.dataset_file, Path(place) / DOMAIN, show)
        if len(domain.info.domains) != 1:
            raise DataError(f"{settings.dataset_file} holds {len(domain.info.domains)} domains; an expert is for one.")
        general: TokenStore | None = None
        if settings.anchor_file is not None:
            general = prepared_with(base.tokenizer, settings.anchor_file, Path(place) / GENERAL, show)
        elif base.data is not None:
            own = TokenStore.open(base.data)
            general = own if own.info.tokenizer_fingerprint == tokenizer_fingerprint(base.tokenizer) else None
        if general is None:
            show("No general text: the domain gate cannot be fitted, and only a goal will open it; give --anchor-file.")
        yield domain, general


def _words(bits: Bits) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in bits.items()) or "no held-out text"
