"""Train one expert alone in a brain, and enter it in the registry: `aios experts train`, `train-actv1 --expert-id`."""

import math
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aios.goal_text import goal_text
from aios.settings.expert import ExpertTraining
from aios.store.entry import now
from aios.store.experts import WEIGHTS, ExpertEntry, Registry, expert_folder, making
from aios.store.goals import Goals
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import PackedDataset, heldout_windows, training_windows
from chronomoe.errors import CheckpointError, ConfigError, DataError, TrainingError

Show = Callable[[str], None]
DOMAIN, GENERAL = "domain", "general"


def train_expert(
    root: Path,
    expert_id: str,
    settings: ExpertTraining,
    base: tuple[Any, Path] | None = None,
    show: Show = print,
) -> dict[str, Any]:
    """Train ``expert_id`` and write artifacts/experts/<id>/expert.safetensors and the registry.

    ``base``: a model and the folder of its tokenizer, in place of ``settings.brain``. Returns the trainer's results and
    the ``entry`` of the registry; a run that was interrupted leaves an earlier version as it was and has no entry.

    Raises :class:`ConfigError` for settings that cannot work or a frozen expert, :class:`DataError` for text that
    cannot be used.
    """
    from chronomoe.experts.attachment import detach_expert

    folder, registry = expert_folder(root, expert_id), Registry(root)
    known = {entry.expert_id: entry for entry in registry.entries()}.get(expert_id)
    if known is not None and known.is_frozen:
        raise ConfigError(f"expert {expert_id} is frozen; `aios experts unfreeze {expert_id}` lets it be trained.")
    if settings.dataset_file is None:
        raise ConfigError("name the text of the domain with --dataset-file.")
    Goals(root).all()  # goals that cannot be read are found out before the training, not after
    model, tokenizer_folder, own_data = _base(root, settings, base)
    for uid in list(getattr(model, "subbrains", {})):
        detach_expert(model, uid)  # the base alone is what it learns in
    with making(root, expert_id), _stores(settings, tokenizer_folder, own_data, show) as (domain, general):
        return _train(root, folder, expert_id, settings, known, model, domain, general, show)


def _train(
    root: Path,
    folder: Path,
    expert_id: str,
    settings: ExpertTraining,
    known: ExpertEntry | None,
    model: Any,
    domain: TokenStore,
    general: TokenStore | None,
    show: Show,
) -> dict[str, Any]:
    from chronomoe.experts import training
    from chronomoe.experts.attachment import attach_expert, detach_expert
    from chronomoe.experts.expert import DomainExpert
    from chronomoe.experts.file import base_of, save_expert
    from chronomoe.hosts.attach import moe_layers

    length = min(settings.max_seq_len, model.config.max_position_embeddings)
    blocks = moe_layers(model)
    if not blocks:
        raise ConfigError("this brain has no experts to train another one beside; `aios brains upcycle` gives it some.")
    gate_layers = range(min(2, len(blocks)))
    # Before the gate has heard anything nobody is open; a recurrent model comes by its first layers again.
    recurrent = getattr(model.model, "routing_depths", 1) > 1
    expert = DomainExpert(
        expert_id,
        hidden_size=model.config.hidden_size,
        width=blocks[0].experts.intermediate_dim,
        layers=range(0 if recurrent else gate_layers[-1], len(blocks)),
        act=model.config.hidden_act,
        gate_layers=gate_layers,
        uid=None if known is None else known.expert_uid,
    )
    base = base_of(model)
    windows = training_windows(domain, length, settings.calibration_windows, settings.seed + 1)[
        domain.info.domains[0].name
    ]
    others = (
        {}
        if general is None
        else training_windows(general, length, 2 * settings.calibration_windows, settings.seed + 1)
    )
    model.eval()
    training.begin(expert, model, windows[:32], settings.redraw, settings.seed)
    measured = _Measured(model, domain, general, length, settings)
    before = measured.bits_per_byte()
    show(f"Base, bits per byte: {_words(before)}.")
    with training.trainee(model, expert, settings.anchor_weight) as trainee:
        results = _run(trainee, domain, general, length, folder, settings, show)
    expert.eval()
    if not results["finished"]:
        show(f"Stopped at step {results['global_step']}; nothing was written, an earlier version stays as it is.")
        return results
    if others:
        expert.gate.leak.fill_(settings.gate_memory)
        # Half of the windows for the fit, half for the threshold: it is as strict as on text the fit has not seen.
        training.fit_gate(expert, model, windows, [text[: len(windows)] for text in others.values()])
        others = {name: text[len(windows) :] for name, text in others.items()}
    attach_expert(model, expert)
    try:
        if others:
            calibration = training.calibrate(model, expert, others, settings.false_alarm, settings.harm_kl)
        else:
            # Without general text there is nothing to tell the domain from: only a goal's prior opens the gate.
            expert.gate.threshold.fill_(0)
            calibration = {"note": "no general text: the gate has no evidence, only a goal opens it"}
        after = measured.bits_per_byte()
        expert.forced = True
        forced = measured.bits_per_byte()
        expert.forced = None
    finally:
        detach_expert(model, expert.uid)
    if not all(map(math.isfinite, [*after.values(), *forced.values(), expert.mean_mixing])):
        raise TrainingError(
            f"expert {expert_id} came to nothing: with it the text's likelihood is not finite. Lower --lr; nothing was "
            "written, an earlier version stays as it is."
        )
    metrics = {"before": before, "after": after, "always_open": forced, "unit": "bits per byte"}
    show(f"With the expert behind its gate: {_words(after)}; always open: {_words(forced)}.")
    goals = () if settings.default_goal is None else (goal_text(settings.default_goal),)
    config = {
        "hidden_size": expert.hidden_size, "intermediate_size": expert.width, "lr": settings.lr,
        "steps": settings.steps, "batch_size": settings.batch_size, "max_seq_len": length, "redraw": settings.redraw,
        "anchor_weight": settings.anchor_weight, "seed": settings.seed,
    }  # fmt: skip
    header = {
        "created": now(),
        "base": base,
        "tokenizer_fingerprint": domain.info.tokenizer_fingerprint,
        "training": config,
        "calibration": calibration,
        "metrics": metrics,
        "goals": list(goals),
        "data": {"domain": domain.info.fingerprint, "general": None if general is None else general.info.fingerprint},
    }
    now_known = {entry.expert_id: entry for entry in Registry(root).entries()}.get(expert_id)
    if (now_known and now_known.expert_uid) != (known and known.expert_uid) or (now_known and now_known.is_frozen):
        raise CheckpointError(
            f"expert {expert_id} was frozen, renamed, deleted or made by somebody else while it was trained; nothing "
            "was written."
        )
    save_expert(expert, header, folder / WEIGHTS)
    entry = Registry(root).upsert(
        ExpertEntry(
            expert_id=expert_id,
            expert_uid=expert.uid,
            description=f"Expert trained on {settings.dataset_file.name}" if settings.dataset_file else "",
            goals=goals,
            training_datasets=(str(settings.dataset_file),),
            performance_metrics=metrics,
            checkpoint_path=str(folder / WEIGHTS),
            base_fingerprint=base["fingerprint"],
            tokenizer_fingerprint=domain.info.tokenizer_fingerprint,
            training_config=config,
        )
    )
    heard = results["global_step"] * settings.batch_size * length
    entry = Registry(root).record_use(expert_id, heard, expert.mean_mixing)
    show(f"Wrote {folder / WEIGHTS}")
    return results | {"entry": entry}


class _Measured:
    """Held-out bits per byte of the domain and of each general domain."""

    def __init__(
        self, model: Any, domain: TokenStore, general: TokenStore | None, length: int, settings: ExpertTraining
    ) -> None:
        self.model, self.batch = model, settings.batch_size
        self.windows = {}
        for store, rename in [(domain, DOMAIN)] + ([] if general is None else [(general, None)]):
            for one in store.info.domains if settings.eval_tokens else ():
                if one.heldout.documents:
                    self.windows[rename or one.name] = heldout_windows(store, one.name, length, settings.eval_tokens)

    def bits_per_byte(self) -> dict[str, float]:
        """By domain, of the model as it stands."""
        from chronomoe.training.evaluation import bits_per_byte

        return {name: round(bits_per_byte(self.model, one, self.batch), 5) for name, one in self.windows.items()}


def _run(
    trainee: Any,
    domain: TokenStore,
    general: TokenStore | None,
    length: int,
    folder: Path,
    settings: ExpertTraining,
    show: Show,
) -> dict[str, Any]:
    from torch.utils.data import DataLoader

    from chronomoe.experts.training import WithAnchor
    from chronomoe.training.config import TrainingConfig
    from chronomoe.training.trainer import ChronoMoETrainer

    count = settings.steps * settings.batch_size
    data: Any = PackedDataset(domain, length, settings.seed, count)
    if general is not None and settings.anchor_weight > 0:
        data = WithAnchor(data, PackedDataset(general, length, settings.seed, count))
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
        trainer = ChronoMoETrainer(trainee, config, DataLoader(data, batch_size=settings.batch_size), show=show)
        return trainer.train()


def _base(root: Path, settings: ExpertTraining, base: tuple[Any, Path] | None) -> tuple[Any, Path, Path | None]:
    """Model, folder of its tokenizer, and the prepared data it was trained on if that is still there."""
    from aios.brains.bundle import data_of, find_brain, load_brain, model_folder

    if base is not None:
        return *base, None
    if settings.brain is None:
        raise ConfigError("name the brain the expert is trained in with --brain.")
    bundle = find_brain(root, settings.brain)
    model, _ = load_brain(bundle)
    return model, model_folder(bundle), data_of(root, bundle)


@contextmanager
def _stores(settings: ExpertTraining, tokenizer: Path, own_data: Path | None, show: Show) -> Any:
    """The domain's text and the general text, tokenized as the base was."""
    from aios.data.prepare import prepared_with
    from aios.data.tokenizers import tokenizer_fingerprint

    with TemporaryDirectory() as place:
        assert settings.dataset_file is not None
        domain = prepared_with(tokenizer, settings.dataset_file, Path(place) / DOMAIN, show)
        if len(domain.info.domains) != 1:
            raise DataError(f"{settings.dataset_file} holds {len(domain.info.domains)} domains; an expert is for one.")
        general: TokenStore | None = None
        if settings.anchor_file is not None:
            general = prepared_with(tokenizer, settings.anchor_file, Path(place) / GENERAL, show)
        elif own_data is not None:
            own = TokenStore.open(own_data)
            general = own if own.info.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer) else None
        if general is None:
            show("No general text: the domain gate cannot be fitted, and only a goal will open it; give --anchor-file.")
        yield domain, general


def _words(bits: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in bits.items()) or "no held-out text"
