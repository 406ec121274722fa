"""Train a hierarchical reasoning model on a text: what `train-actv1` does around :func:`aios.brains.train.train`."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from aios.brains.brain import Brain
from aios.brains.build import tokenizer_of
from aios.brains.families import ACTV1
from aios.brains.train import GoalTraining, check_place, train
from aios.data.prepare import prepare
from aios.data.prepared import flags_explained
from aios.data.sources import Source
from aios.settings.actv1 import ACTv1Run
from aios.settings.data import PrepareConfig
from aios.workspace import Workspace
from chronomoe.data.token_store import TokenStore
from chronomoe.errors import ConfigError

Show = Callable[[str], None]


def train_actv1(run: ACTv1Run, show: Show = print, *, goals: GoalTraining | None = None) -> dict[str, Any]:
    """Train (plan, resume) as the flags say, on text that is prepared first; results as of `train`."""
    run.check()
    use_cpu = wants_cpu(run, show)
    run = run.canonical()
    if run.resume:
        if "learning_rate" in run.given:
            _tell_rate(run.over(Brain(run.root, run.bundle).run.run), show)
        _check_same_text(run)
        return train(run, show, goals=goals, use_cpu=use_cpu)
    ACTV1.configure(run.shape, 1, run.seq_len)  # a shape that cannot be is refused before anything is touched
    if run.dry_run:
        if run.name is not None:
            check_place(run)
        _tell_rate(run, show)
        with TemporaryDirectory() as nowhere:
            plan = run.replace(name=None, save_dir=Path(nowhere))
            if not run.is_prepared:
                _prepare(run, Path(nowhere), show)
            return train(plan, show, goals=goals, use_cpu=use_cpu)
    _tell_rate(run, show)
    if run.name is None:
        _set_aside(run.bundle, show)
    fresh = not run.bundle.exists()
    try:
        with Brain(run.root, run.bundle).lock():
            check_place(run)
            if not run.is_prepared:
                _prepare(run, run.bundle, show)
        return train(run, show, goals=goals, use_cpu=use_cpu)
    except BaseException:
        if fresh and not Brain(run.root, run.bundle).has_run:
            shutil.rmtree(run.bundle, ignore_errors=True)  # a folder with data and no brain would block the next run
        raise


def wants_cpu(run: ACTv1Run, show: Show = print) -> bool:
    """Must the CPU be used though there may be an accelerator?

    Raises :class:`ConfigError` for what this machine, or this way of starting, cannot do.
    """
    kind, _, index = run.device.partition(":")
    if index:
        raise ConfigError(f"--device {run.device}: choose among several with CUDA_VISIBLE_DEVICES={index}.")
    available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available:
        raise ConfigError(f"there is no device {run.device!r}; use auto, cpu, cuda or mps.")
    if not available[kind]:
        raise ConfigError(f"this machine has no {kind} device; use --device auto or cpu.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = run.world_size if run.world_size is not None else max(processes, 2 if run.ddp else 1)
    if wanted != processes:
        raise ConfigError(
            f"there are {processes} processes, not {wanted}: "
            f"start them with `accelerate launch --num_processes {wanted} -m aios ...`."
        )
    if run.zero_stage != "none" and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        raise ConfigError(
            f"--zero-stage {run.zero_stage} works under accelerate: "
            f"`accelerate launch --use_deepspeed --zero_stage {run.zero_stage[-1]} -m aios ...`."
        )
    on_cpu = kind == "cpu" or not (available["cuda"] or available["mps"])
    if on_cpu and run.model_dtype == "bf16":
        show("bf16 is several times slower than fp32 on CPUs; leave out --model-dtype bf16 to go faster.")
    elif on_cpu and "amp" in run.given and run.amp:
        show("--amp: this CPU is faster in fp32, so fp32 it is.")
    return kind == "cpu"


def _tell_rate(run: ACTv1Run, show: Show) -> None:
    rate = run.resolved().learning_rate
    if rate < run.learning_rate:
        show(
            f"Learning rate {rate:g} instead of {run.learning_rate:g}, for a mixture of experts; "
            "--no-auto-adjust-lr keeps yours."
        )


def _check_same_text(run: ACTv1Run) -> None:
    """A brain goes on with the text it was begun with."""
    data = ACTV1.default_data(run.root, run.bundle)
    if run.dataset_file is None or run.is_prepared or not (data / "data.json").is_file():
        return
    sources = TokenStore.open(data).info.domains[0].sources
    if str(run.dataset_file) not in sources:
        raise ConfigError(
            f"this brain was begun on {', '.join(sources)} and goes on with it; "
            "--student-init starts a new brain from its weights."
        )


def _set_aside(bundle: Path, show: Show) -> None:
    """Move an earlier brain without a name to another folder."""
    if not (bundle / "run.json").exists() and Brain(Path(), bundle).state == "empty":
        return
    number = next(n for n in range(1, 10**6) if not bundle.with_name(f"{bundle.name}.{n}").exists())
    with Brain(Path(), bundle).lock():
        pass  # no process is training it
    bundle.rename(bundle.with_name(f"{bundle.name}.{number}"))
    show(f"The brain that was in {bundle} is in {bundle.name}.{number} now; --brain-name keeps a brain by its name.")


def _prepare(run: ACTv1Run, bundle: Path, show: Show) -> None:
    """Tokenize the dataset into the bundle."""
    base = run.model or Workspace(run.root).base_model
    Workspace(run.root).refuse_missing_base(base, "config.json" if run.tokenizer else "tokenizer.json")
    tokenizer = tokenizer_of(run.tokenizer, base, run.family)
    sources = [Source(name="text", path=str(run.dataset_file))]
    if run.eval_file is not None:
        sources.append(Source(name="eval", path=str(run.eval_file), held_out=True))
    config = PrepareConfig(tokenizer=tokenizer, overwrite=True, ascii_only=run.ascii_only)
    bundle.mkdir(parents=True, exist_ok=True)
    data = ACTV1.default_data(run.root, bundle)
    with flags_explained(run.dataset_file or base, tokenizer):
        warnings = prepare(sources, data, config, report=lambda line: None).warnings
    for warning in warnings:
        show(f"Note: {warning}")
