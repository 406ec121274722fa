"""`aios hrm-hf train-actv1`: its flags, and what they mean for the one training loop there is."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from aios.brains.brain import Brain
from aios.brains.families import ACTV1
from aios.brains.run_file import read_run
from aios.brains.settings import BrainTraining, Given, HRMShape, Run, RunSettings
from aios.settings.goals import TrainingGoals
from aios.workspace import Workspace
from chronomoe.control.config import Ablation
from chronomoe.data.token_store import TokenStore
from chronomoe.errors import ConfigError, require
from chronomoe.training.checkpoint import list_checkpoints

Show = Callable[[str], None]

MOE_LR_CAP = 1e-3
"""Above this rate routers of small models were seen to run away."""
MOE_ROUTER_SCALE = 0.5


def adjusted_rates(lr: float, use_moe: bool, adjust: bool) -> tuple[float, float]:
    """Learning rate, and the routers' as a multiple of it; never above ``lr``.

    A router decides which expert learns from a token, so its mistakes feed themselves: with experts the rate is at
    most 1e-3 and the routers take half of it. A dense model, or ``adjust`` off, keeps ``lr``.
    """
    if not (use_moe and adjust):
        return lr, 1.0
    return min(lr, MOE_LR_CAP), MOE_ROUTER_SCALE


def warmup_steps(steps: int) -> int:
    """Steps of linear learning-rate warm-up: a tenth of the run, 10 to 200, and never more than the run."""
    return min(steps, 200, max(10, steps // 10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ACTv1Flags(Given):
    """What `train-actv1` can be told besides the shape of the model."""

    model: Path | None = None
    """Folder of the tokenizer. [artifacts/hf_implant/base_model]"""
    dataset_file: Path | None = None
    """Text to train on: a file (.txt, .md, .csv, .tsv, .jsonl, .gz, .zip, .parquet), a folder, or prepared data."""
    max_seq_len: int = 128
    """Tokens per training sequence."""
    batch_size: int = 8
    """Sequences per micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step."""
    steps: int = 200
    """Optimizer steps; with --iterate, of each cycle."""
    lr: float = 2e-4
    """Learning rate."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    save_dir: Path | None = None
    """Bundle of a brain without a name. [artifacts/training_datasets/actv1]"""
    ascii_only: bool = False
    """Leave out lines with other than ASCII characters."""
    eval_file: Path | None = None
    """Text to evaluate on, besides what is held out of the dataset."""
    eval_batches: int = 10
    """Batches of held-out text per domain in each evaluation; 0 evaluates nothing."""
    stop_file: Path | None = None
    """Save and stop when this file appears."""
    log_file: Path | None = None
    """Metrics, one JSON object a line, appended. [metrics.jsonl in the bundle]"""
    tensorboard: bool = False
    """Write the numbers for TensorBoard too, into the folder tensorboard beside the metrics."""
    student_init: Path | None = None
    """Weights to start from: a bundle, a checkpoint or a .safetensors file of the same shape."""
    brain_name: str | None = None
    """Name of the brain, a folder in --bundle-dir."""
    default_goal: str | None = None
    """Goal kept with the brain."""
    bundle_dir: Path | None = None
    """Folder of brains. [artifacts/brains/actv1]"""
    expert_id: str | None = None
    """Train one expert alone, under this id, in the brain --brain-name (else in a fresh model)."""
    anchor_file: Path | None = None
    """With --expert-id: general text on which the expert shall change nothing."""
    iterate: bool = False
    """Train in cycles of --steps until stopped."""
    resume: bool = False
    """Continue the brain from its latest checkpoint, with its own settings."""
    linear_dataset: bool = True
    """Read the text in order; --no-linear-dataset shuffles it."""
    dataset_start_offset: int = 0
    """Sequences to pass over at the beginning of the text."""
    gradient_checkpointing: bool = True
    """Recompute activations: less memory, about a third more time."""
    amp: bool = True
    """bf16 where the device is fast at it; a CPU is not, and computes in fp32."""
    use_8bit_optimizer: bool = False
    """Keep the optimizer's moments in 8 bits (needs bitsandbytes)."""
    use_chunked_training: bool = False
    """Read each sequence in pieces of --chunk-size: long sequences in bounded memory."""
    chunk_size: int = 2048
    """Tokens per piece."""
    moe_capacity_factor: float = 1.25
    """Tokens an expert may take in training, as a multiple of its fair share; 0 drops nothing."""
    auto_adjust_lr: bool = True
    """Lower the rate for a mixture of experts, the routers' most; never raises it."""
    model_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """bf16 computes in bf16 whatever the device; weights are kept in fp32."""
    ddp: bool = False
    """Train on several processes; start them with `accelerate launch`."""
    world_size: int | None = None
    """Processes there must be."""
    zero_stage: Literal["none", "zero1", "zero2", "zero3"] = "none"
    """Shard optimizer, gradients, weights: through `accelerate launch` with DeepSpeed."""
    lb_coef: float = 0.05
    """Weight of the load-balancing loss."""
    z_loss_coef: float = 0.001
    """Weight of the router z-loss."""
    balance: Ablation = "full"
    """How the load is balanced: none, aux (loss only), loss_free, pi, ..., full (the whole control layer)."""
    control_layer: bool = True
    """--no-control-layer is --balance aux."""
    seed: int = 0
    """Seed of initialisation, data order and exploration."""
    eval_every: int | None = None
    """Steps between evaluations; at the end only when not given."""
    save_every: int | None = None
    """Steps between checkpoints; at the end only when not given."""
    log_every: int | None = None
    """Steps between log lines; a twentieth of the run when not given."""
    dry_run: bool = False
    """Print the plan and do nothing."""
    root: Path = Path()
    """Workspace folder."""

    def __post_init__(self) -> None:
        counts = "max_seq_len", "batch_size", "steps", "gradient_accumulation_steps", "chunk_size"
        require(self, *counts, least=1, integer=True)
        require(self, "eval_every", "save_every", "log_every", least=1, integer=True, optional=True)
        require(self, "eval_batches", "dataset_start_offset", least=0, integer=True)
        require(self, "lr", above=0)
        if self.brain_name is not None and self.save_dir is not None:
            raise ConfigError("--brain-name and --save-dir both say where the brain goes; give one of them.")

    @property
    def bundle(self) -> Path:
        """Where the brain goes; :class:`ConfigError` for a name that is not a plain word."""
        workspace = Workspace(self.root)
        if self.brain_name is None:
            return self.save_dir or self.root / "artifacts/training_datasets/actv1"
        named = workspace.brain(self.brain_name, ACTV1.name)
        return named if self.bundle_dir is None else self.bundle_dir / named.name


def train_actv1(
    flags: ACTv1Flags,
    shape: HRMShape,
    goals: TrainingGoals = TrainingGoals(),  # noqa: B008 (frozen)
    show: Show = print,
) -> dict[str, Any]:
    """Train (plan, resume) as the flags say; results as of :func:`aios.brains.train.train`.

    With ``expert_id`` one expert is trained alone instead, in the brain named or in --student-init's, or else in the
    weights of --model or a fresh model, from which it does not transfer: results as of
    :func:`aios.experts.train.train_expert`.
    """
    if flags.expert_id is not None:
        if goals.any:
            raise ConfigError("an expert that is trained alone is heard everywhere; --default-goal names its goal.")
        return _train_expert(flags, shape, show)
    if flags.dry_run and not flags.resume:
        with TemporaryDirectory() as nowhere:
            return _train(flags, shape, goals, Path(nowhere), show)
    return _train(flags, shape, goals, flags.bundle, show)


def _train(flags: ACTv1Flags, shape: HRMShape, goals: TrainingGoals, bundle: Path, show: Show) -> dict[str, Any]:
    from aios.brains.train import check_place, train

    _check_flags(flags)
    _check_machine(flags, show)
    use_moe = shape.use_moe
    if flags.resume:
        saved = read_run(bundle)
        flags, use_moe = _as_begun(flags, saved), saved["shape"].get("use_moe", True)
    else:
        ACTV1.configure(
            shape, 1, max(1, flags.max_seq_len)
        )  # a shape that cannot be is refused before anything is touched
    run = dataclasses.replace(to_run(flags, shape, bundle, use_moe), goals=goals)
    if flags.dry_run and flags.brain_name is not None:
        check_place(flags.bundle, run)  # a plan has a place of its own
    lr, _ = adjusted_rates(flags.lr, use_moe, flags.auto_adjust_lr)
    if lr < flags.lr and (not flags.resume or "lr" in flags.given_names):
        show(
            f"Learning rate {lr:g} instead of {flags.lr:g}, for a mixture of experts; --no-auto-adjust-lr keeps yours."
        )
    if flags.resume:
        _check_same_text(flags, bundle)
        return train(run, show)
    if flags.brain_name is None:
        _set_aside(bundle, show)
    fresh = not bundle.exists()
    try:
        with Brain(flags.root, bundle).lock():
            check_place(bundle, run)
            if not _is_prepared(flags):
                _prepare(flags, bundle, show)
        return train(run, show)
    except BaseException:
        if fresh and not (bundle / "run.json").exists():
            shutil.rmtree(bundle, ignore_errors=True)  # a folder with data and no brain is in the way of the next
        raise


def _train_expert(flags: ACTv1Flags, shape: HRMShape, show: Show) -> dict[str, Any]:
    from aios.experts.train import train_expert
    from aios.settings.expert import ExpertTraining

    odd = {"save_dir", "resume", "iterate", "use_moe", "dry_run", "eval_file", "use_chunked_training", "stop_file"}
    if given := sorted(odd & (flags.given_names | (set() if shape.use_moe else {"use_moe"}))):
        name = "no-moe" if given[0] == "use_moe" else given[0].replace("_", "-")
        raise ConfigError(f"--{name} has no meaning when one expert is trained alone (--expert-id); leave it out.")
    _check_flags(flags)
    _check_machine(flags, show)
    settings = ExpertTraining(
        dataset_file=flags.dataset_file,
        brain=None if flags.brain_name is None else str(flags.bundle),
        anchor_file=flags.anchor_file,
        steps=flags.steps,
        batch_size=flags.batch_size,
        max_seq_len=flags.max_seq_len,
        lr=flags.lr if "lr" in flags.given_names else ExpertTraining.lr,
        eval_tokens=flags.eval_batches * flags.batch_size * flags.max_seq_len,
        default_goal=flags.default_goal,
        log_file=flags.log_file,
        seed=flags.seed,
    )
    assert flags.expert_id is not None
    base = None if settings.brain is not None else _base_for_expert(flags, shape, show)
    return train_expert(flags.root, flags.expert_id, settings, base, show)


def _base_for_expert(flags: ACTv1Flags, shape: HRMShape, show: Show) -> Any:
    """A model that is no brain of the workspace, and the folder of its tokenizer."""
    import torch

    from aios.brains.families import load_weights
    from aios.brains.loaded import load_brain, load_tokenizer
    from aios.experts.train import Base

    folder = flags.model or Workspace(flags.root).base_model
    if flags.student_init is not None:
        student = Brain(flags.root, flags.student_init)
        return Base(load_brain(student).model, student.weights)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"there is no base model {folder}; `{Workspace(flags.root).command('init')}` makes one.")
    if any(folder.glob("model*.safetensors")):
        return Base(load_weights(folder).eval(), folder)
    torch.manual_seed(flags.seed)
    tokenizer = load_tokenizer(folder)
    show(
        "The base is a fresh, untrained model: the expert learns, but will not transfer to a trained brain. "
        "Name one with --brain-name."
    )
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    config = ACTV1.configure(shape, len(tokenizer), flags.max_seq_len, **ids)
    return Base(ACTV1.model_class(config).eval(), folder)


def _is_prepared(flags: ACTv1Flags) -> bool:
    return flags.dataset_file is not None and (flags.dataset_file / "data.json").is_file()


def _check_flags(flags: ACTv1Flags) -> None:
    """Refuse what is wanting, missing or contradictory, before anything is touched."""
    given, dataset = flags.given_names, flags.dataset_file
    if flags.anchor_file is not None and flags.expert_id is None:
        raise ConfigError("--anchor-file is for the training of one expert alone; give --expert-id too.")
    if dataset is None and not flags.resume:
        raise ConfigError("name the text to train on with --dataset-file.")
    if flags.resume and (fixed := sorted({"ascii_only", "eval_file", "student_init"} & given)):
        raise ConfigError(f"--{fixed[0].replace('_', '-')} is settled when a brain is begun; leave it out on --resume.")
    if _is_prepared(flags) and (unread := sorted({"ascii_only", "eval_file"} & given)):
        raise ConfigError(f"{dataset} is prepared already; --{unread[0].replace('_', '-')} has no text to work on.")
    if flags.model_dtype == "fp16":
        raise ConfigError("--model-dtype fp16 is not supported: weights stay in fp32; use --amp, or bf16.")
    if "chunk_size" in given and not flags.use_chunked_training:
        raise ConfigError("--chunk-size needs --use-chunked-training.")
    if flags.dataset_start_offset and not flags.linear_dataset:
        raise ConfigError("--dataset-start-offset counts in the order of the text; leave out --no-linear-dataset.")
    if not flags.control_layer and "balance" in given and flags.balance == "full":
        raise ConfigError("--no-control-layer and --balance full contradict each other; give one of them.")
    if flags.stop_file is not None and flags.stop_file.exists():
        raise ConfigError(f"the stop file {flags.stop_file} is there already; remove it to train.")


def _as_begun(flags: ACTv1Flags, saved: dict[str, Any]) -> ACTv1Flags:
    """The flags of a run that is continued: what others are derived from is as the brain has it, unless given."""
    settings, training = RunSettings(**saved["settings"]), BrainTraining(**saved["training"])
    known: dict[str, Any] = {
        "max_seq_len": settings.seq_len,
        "batch_size": training.batch_size,
        "auto_adjust_lr": training.router_lr_scale != 1,
    }
    changed = {name: value for name, value in known.items() if name not in flags.given_names}
    return dataclasses.replace(flags, **changed).naming(set(flags.given_names))


def _check_same_text(flags: ACTv1Flags, bundle: Path) -> None:
    """A brain goes on with the text it was begun with."""
    data = bundle / "data"
    if flags.dataset_file is None or _is_prepared(flags) or not (data / "data.json").is_file():
        return
    sources = TokenStore.open(data).info.domains[0].sources
    if str(flags.dataset_file) not in sources:
        raise ConfigError(
            f"this brain was begun on {', '.join(sources)} and goes on with it; "
            "--student-init starts a new brain from its weights."
        )


def to_run(flags: ACTv1Flags, shape: HRMShape, bundle: Path, use_moe: bool) -> Run:
    """The run the flags describe; only named flags count as given when it continues another."""
    lr, router_scale = adjusted_rates(flags.lr, use_moe, flags.auto_adjust_lr)
    control = flags.balance if flags.control_layer or "balance" in flags.given_names else "aux"
    every = flags.steps
    endless = flags.iterate and not flags.dry_run
    # Each setting, and the flags it comes from.
    settings: dict[str, tuple[Any, ...]] = {
        "root": (flags.root, "root"),
        "model": (flags.model, "model"),
        "data": (flags.dataset_file, "dataset_file") if _is_prepared(flags) else (None, ""),
        "name": (flags.brain_name or bundle.name, "brain_name"),
        "seq_len": (flags.max_seq_len, "max_seq_len"),
        "moe_capacity_factor": (flags.moe_capacity_factor or None, "moe_capacity_factor"),
        "eval_tokens": (flags.eval_batches * flags.batch_size * flags.max_seq_len, "eval_batches"),
        "resume": (flags.resume, "resume"),
        "dry_run": (flags.dry_run, "dry_run"),
        "linear": (flags.linear_dataset, "linear_dataset"),
        "start_offset": (flags.dataset_start_offset, "dataset_start_offset"),
        "student_init": (flags.student_init, "student_init"),
        "default_goal": (flags.default_goal, "default_goal"),
    }
    training: dict[str, tuple[Any, ...]] = {
        "learning_rate": (lr, "lr"),
        "router_lr_scale": (router_scale, "auto_adjust_lr"),
        "max_steps": (10**9 if endless else flags.steps, "steps", "iterate"),
        "lr_schedule": ("constant" if flags.iterate else "cosine", "iterate"),
        "kappa_schedule": ("adaptive" if flags.iterate else "cosine", "iterate"),
        "lr_warmup_steps": (warmup_steps(flags.steps), "steps"),
        "kappa_warmup_steps": (flags.steps // 10, "steps"),
        "batch_size": (flags.batch_size, "batch_size"),
        "gradient_accumulation_steps": (flags.gradient_accumulation_steps, "gradient_accumulation_steps"),
        "lambda_balance": (flags.lb_coef, "lb_coef"),
        "lambda_z": (flags.z_loss_coef, "z_loss_coef"),
        "control": (control, "balance", "control_layer"),
        "gradient_checkpointing": (flags.gradient_checkpointing, "gradient_checkpointing"),
        "precision": (_precision(flags), "amp", "model_dtype"),
        "optimizer": ("adamw8bit" if flags.use_8bit_optimizer else "adamw", "use_8bit_optimizer"),
        "chunk_size": (flags.chunk_size if flags.use_chunked_training else None, "use_chunked_training", "chunk_size"),
        "stop_file": (None if flags.stop_file is None else str(flags.stop_file), "stop_file"),
        "log_file": (None if flags.log_file is None else str(flags.log_file), "log_file"),
        "tensorboard": (flags.tensorboard, "tensorboard"),
        "seed": (flags.seed, "seed"),
        "eval_every_n_steps": (flags.eval_every or every, "eval_every", "iterate"),
        "save_every_n_steps": (flags.save_every or every, "save_every", "iterate"),
        "log_every_n_steps": (flags.log_every or max(1, every // 20), "log_every"),
    }
    return Run(
        settings=RunSettings(**{name: value for name, (value, *_) in settings.items()}).naming(
            {name for name, (_, *names) in settings.items() if flags.given_names & set(names)}
        ),
        shape=shape,
        training=BrainTraining(**{name: value for name, (value, *_) in training.items()}).naming(
            {name for name, (_, *names) in training.items() if flags.given_names & set(names)}
        ),
        family=ACTV1.name,
        bundle=bundle,
    )


def _precision(flags: ACTv1Flags) -> str:
    if flags.model_dtype == "bf16":
        return "bf16"
    return "auto" if flags.amp else "fp32"


def _check_machine(flags: ACTv1Flags, show: Show) -> None:
    """Refuse what this machine or this way of starting cannot do."""
    import os

    import torch

    kind, _, index = flags.device.partition(":")
    if index:
        raise ConfigError(f"--device {flags.device}: choose among several with CUDA_VISIBLE_DEVICES={index}.")
    available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available:
        raise ConfigError(f"there is no device {flags.device!r}; use auto, cpu, cuda or mps.")
    if not available[kind]:
        raise ConfigError(f"this machine has no {kind} device; use --device auto or cpu.")
    if kind == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = flags.world_size if flags.world_size is not None else max(processes, 2 if flags.ddp else 1)
    if wanted != processes:
        raise ConfigError(
            f"there are {processes} processes, not {wanted}: "
            f"start them with `accelerate launch --num_processes {wanted} -m aios ...`."
        )
    if flags.zero_stage != "none" and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        raise ConfigError(
            f"--zero-stage {flags.zero_stage} works under accelerate: "
            f"`accelerate launch --use_deepspeed --zero_stage {flags.zero_stage[-1]} -m aios ...`."
        )
    on_cpu = kind == "cpu" or not (available["cuda"] or available["mps"])
    if on_cpu and flags.model_dtype == "bf16":
        show("bf16 is several times slower than fp32 on CPUs; leave out --model-dtype bf16 to go faster.")
    elif on_cpu and "amp" in flags.given_names and flags.amp:
        show("--amp: this CPU is faster in fp32, so fp32 it is.")


def _set_aside(bundle: Path, show: Show) -> None:
    """An earlier brain without a name keeps its files, under another folder."""
    if not any((bundle / file).exists() for file in ("run.json", "model.safetensors")) and not list_checkpoints(
        bundle / "checkpoints"
    ):
        return
    number = next(n for n in range(1, 10**6) if not bundle.with_name(f"{bundle.name}.{n}").exists())
    with Brain(Path(), bundle).lock():
        pass  # nobody is training it
    bundle.rename(bundle.with_name(f"{bundle.name}.{number}"))
    show(f"The brain that was in {bundle} is in {bundle.name}.{number} now; --brain-name keeps a brain by its name.")


def _prepare(flags: ACTv1Flags, bundle: Path, show: Show) -> None:
    """Tokenize the dataset into the bundle."""
    from aios.data.prepare import PrepareConfig, prepare
    from aios.data.readers import Source

    base = flags.model or Workspace(flags.root).base_model
    if not (base / "tokenizer.json").is_file():
        raise ConfigError(f"there is no base model {base}; `{Workspace(flags.root).command('init')}` makes one.")
    sources = [Source(name="text", path=str(flags.dataset_file))]
    if flags.eval_file is not None:
        sources.append(Source(name="eval", path=str(flags.eval_file), held_out=True))
    config = PrepareConfig(tokenizer=base, overwrite=True, ascii_only=flags.ascii_only)
    bundle.mkdir(parents=True, exist_ok=True)
    for warning in prepare(sources, bundle / "data", config, report=lambda line: None).warnings:
        show(f"Note: {warning}")
