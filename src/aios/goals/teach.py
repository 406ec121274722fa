"""Teach the routers of a brain what the text of goals means for them: `aios goals teach`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.data.prepared import prepared_with
from aios.goals.use import find_goals
from aios.settings.goals import GoalFlags, Lesson
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import PackedDataset, heldout_windows
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.experts.attachment import detach_expert
from chronomoe.experts.training import WithAnchor
from chronomoe.goals.conditioning import conditioned, conditioning_trainee, embed, load_conditioning, save_conditioning
from chronomoe.training.config import TrainingConfig
from chronomoe.training.evaluation import bits_per_byte
from chronomoe.training.trainer import ChronoMoETrainer

Show = Callable[[str], None]


class _InTurn(Dataset[dict[str, Any]]):
    """Batches of one goal's text after another's."""

    def __init__(self, texts: Sequence[Dataset[dict[str, Tensor]]], batch_size: int) -> None:
        self.texts, self.batch_size = texts, batch_size

    def __len__(self) -> int:
        return len(self.texts[0])  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        goal = index // self.batch_size % len(self.texts)
        return {**self.texts[goal][index], "goal": goal}


def teach(
    brain: Brain, goals: Sequence[str], files: Sequence[Path], lesson: Lesson, show: Show = print
) -> dict[str, Any]:
    """Teach each goal with its text; writes beside the brain's weights, which stay as they are.

    Returns bits per byte of held-out text, by goal: ``off`` and ``on``. Raises :class:`ConfigError` for goals or texts
    that do not exist.
    """
    if not goals or len(goals) != len(files):
        raise ConfigError("give each --goal its text: as many --dataset-file as --goal, in the same order.")
    with brain.lock(), TemporaryDirectory() as place:
        loaded = load_brain(brain)
        model = loaded.model
        for expert in loaded.attached:
            detach_expert(model, expert.uid)  # the base alone is what is taught
        folder = brain.weights
        # Without regard to links: what is taught needs none.
        found = [find_goals(brain, loaded.tokenizer, GoalFlags(goal=(one,), goals_learned=True))[0] for one in goals]
        length = min(lesson.max_seq_len, loaded.context_length)
        stores = [prepared_with(folder, file, Path(place) / f"text{number}", show) for number, file in enumerate(files)]
        own = brain.data
        try:
            load_conditioning(model, folder)
        except CheckpointError:
            show("What this brain was taught before does not fit it any more, and is replaced.")
        count = lesson.steps * lesson.batch_size
        texts: list[Any] = [PackedDataset(store, length, lesson.seed, count) for store in stores]
        if own is None:
            show("The data this brain was trained on is gone: nothing keeps a goal from changing other text.")
        elif lesson.anchor_weight:
            anchor = PackedDataset(TokenStore.open(own), length, lesson.seed, count)
            texts = [WithAnchor(text, anchor) for text in texts]
        with conditioning_trainee(model, found, lesson.anchor_weight) as trainee:
            results = _run(trainee, _InTurn(texts, lesson.batch_size), Path(place) / "run", lesson, show)
        if not results["finished"]:
            show("Stopped; nothing was written.")
            return {"finished": False}
        measured = {}
        for goal, store in zip(found, stores, strict=True):
            windows = [
                heldout_windows(store, one.name, length, lesson.eval_tokens)
                for one in store.info.domains
                if one.heldout.documents
            ]
            if windows:
                off = fmean(bits_per_byte(model, one, lesson.batch_size) for one in windows)
                with conditioned(model.steering.conditioning, embed(model, [goal])):
                    on = fmean(bits_per_byte(model, one, lesson.batch_size) for one in windows)
                measured[goal.text] = {"off": round(off, 5), "on": round(on, 5)}
        save_conditioning(model, folder)
        return {"finished": True, "bits_per_byte": measured}


def _run(trainee: Any, data: Any, place: Path, lesson: Lesson, show: Show) -> dict[str, Any]:
    config = TrainingConfig(
        checkpoint_dir=str(place),
        max_steps=lesson.steps,
        batch_size=lesson.batch_size,
        learning_rate=lesson.lr,
        weight_decay=0.0,
        log_every_n_steps=max(1, lesson.steps // 10),
        save_every_n_steps=lesson.steps,
        seed=lesson.seed,
    )
    return ChronoMoETrainer(trainee, config, DataLoader(data, batch_size=lesson.batch_size), show=show).train()
