"""Train a brain: base model + prepared data + settings to a bundle."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from aios.brains.brain import METRICS, Brain
from aios.brains.build import build_model, tokenizer_of
from aios.brains.card import write_card
from aios.brains.families import FAMILIES
from aios.brains.loaded import LoadedBrain, load_tokenizer
from aios.brains.plan import describe_plan
from aios.brains.run_file import RUN_FILE, RunFile
from aios.data.prepare import TOKENIZER_FOLDER
from aios.data.prepared import again_command
from aios.data.tokenizers import TOKENIZER_FILES, tokenizer_fingerprint
from aios.settings.goals import TrainingGoals
from aios.settings.train import TrainRun
from aios.store.goals import Goals
from aios.workspace import Workspace
from chronomoe import sidecars
from chronomoe.data.token_store import TokenStore, unigram_bits_per_byte
from chronomoe.data.windows import PackedDataset, heldout_windows
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.experts.listing import read_list
from chronomoe.storage import disk_full_explained
from chronomoe.training.trainer import ChronoMoETrainer
from chronomoe.training.trainer_file import list_checkpoints

Show = Callable[[str], None]


class GoalTraining(Protocol):
    """How a brain trains under goals; :class:`aios.goals.under.UnderGoals` is one."""

    def remembered(self, brain: Brain) -> TrainingGoals:
        """The flags of the brain's own goals."""

    def check(self, brain: Brain, tokenizer: Any, flags: TrainingGoals) -> None:
        """Raise :class:`ConfigError` for goals that a brain cannot be trained under."""

    def start(self, loaded: LoadedBrain, flags: TrainingGoals) -> tuple[Callable[[], dict[str, Any] | None], str]:
        """What a trainer calls to turn the goals on, and its ``goals_key``."""

    def forget(self, brain: Brain) -> None:
        """Leave the brain without goals of its own."""


def train(
    run: TrainRun, show: Show = print, *, goals: GoalTraining | None = None, use_cpu: bool = False
) -> dict[str, Any]:
    """Train (or plan, or resume) as ``run`` says; returns the trainer's results, ``bundle`` and ``unigram``.

    ``goals`` is needed for a run under goals. ``use_cpu`` leaves accelerators alone. Raises :class:`ConfigError` for
    settings that cannot work or a name that is taken, :class:`DataError` for data that cannot be used,
    :class:`CheckpointError` when resuming from something missing, damaged or of another make.
    """
    workspace, bundle = Workspace(run.root), run.bundle
    brain = Brain(run.root, bundle)
    if run.goals.goals_forget and not run.resume:
        raise ConfigError("--goals-forget is for a brain that was trained under goals; give --resume too.")
    saved, changes = None, {}
    if run.resume:
        saved = brain.run
        run = run.over(saved.run)
        changes = run.changes_from(saved.run) if saved.family == run.family else {}
        if goals is not None and not run.goals.wanted and not run.goals.goals_forget:
            run = run.replace(goals=goals.remembered(brain))
        check_place(run)  # before its data is missed, which a brain that was not trained has none of
    if not (bundle / run.checkpoint_dir).resolve().is_relative_to(bundle.resolve()):
        raise ConfigError(f"checkpoint_dir is {run.checkpoint_dir}; name a folder inside the brain.")
    base = run.model or workspace.base_model
    workspace.refuse_missing_base(base, "config.json")
    tokenizer = tokenizer_of(run.tokenizer, base, run.family)
    store = TokenStore.open(run.data or FAMILIES[run.family].default_data(run.root, bundle))
    if run.goals.goal_domain:
        store = store.favouring(run.goals.goal_domain, run.goals.goal_domain_weight)
    file = RunFile(
        family=run.family,
        run=run,
        tokenizer_fingerprint=_matching_tokenizer(tokenizer, store),
        data_fingerprint=store.info.fingerprint,
    )
    if saved is not None:
        _refuse_changed(saved, file, base)
        for name, (old, new) in changes.items():
            show(f"{name}: {new} (was {old})")
    if goals is not None and run.goals.wanted:
        goals.check(brain, load_tokenizer(tokenizer), run.goals)
    settings = run.resolved()
    sequences = _sequences(settings, store)
    model = build_model(
        run.family,
        base,
        settings.shape,
        store.info,
        seed=settings.seed,
        seq_len=settings.seq_len,
        capacity=settings.moe_capacity_factor,
        weights=None if run.resume else settings.student_init,
    )
    if run.dry_run:
        check_place(run)
        for line in describe_plan(model, settings, store.info):
            show(line)
        return {}
    with brain.lock():
        check_place(run)
        if not run.resume:
            (bundle / METRICS).unlink(missing_ok=True)  # of a run that ended before it saved anything
        if run.default_goal and not run.resume:
            Goals(run.root).add(run.default_goal, source="training")
        loaded = LoadedBrain(brain, model, load_tokenizer(tokenizer))
        trainer = _make_trainer(loaded, settings, store, sequences, show, goals, use_cpu)
        if run.resume:
            trainer.load_checkpoint("latest")
            if trainer.state.step > trainer.total_steps:
                raise ConfigError(
                    f"the brain has done {trainer.state.step} steps, more than the {trainer.total_steps} asked for."
                )
        if goals is not None and run.goals.goals_forget:
            goals.forget(brain)
        file.write_file(bundle / RUN_FILE)  # only now: settings that fail must not become the brain's
        results = _results(trainer, store, settings.eval_tokens) | {"bundle": bundle}
        if results["finished"]:
            _publish(trainer, bundle)
            bits = results["evaluation"].get("mean")
            file.replace(published_step=results["global_step"], bits_per_byte=bits).write_file(bundle / RUN_FILE)
            write_card(bundle, model, run, store.info, results)
            show(f"Wrote {bundle}")
        return results


def _matching_tokenizer(tokenizer: Path, store: TokenStore) -> str:
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != store.info.tokenizer_fingerprint:
        raise ConfigError(
            f"the data in {store.path} was prepared with another tokenizer than {tokenizer} has; add --tokenizer "
            f"{shlex.quote(str(store.path / TOKENIZER_FOLDER))} to train with the data's own, or prepare the data "
            f"again: `{again_command(store, tokenizer)}`."
        )
    return fingerprint


def _refuse_changed(saved: RunFile, now: RunFile, base: Path) -> None:
    for what in ("tokenizer", "data"):
        name = f"{what}_fingerprint"
        if getattr(saved, name) != getattr(now, name):
            raise CheckpointError(f"the {what} changed since this brain was begun; restore it or train a new brain.")
    if saved.family != now.family:
        raise ConfigError(f"{now.run.bundle.name} is a brain of the family {saved.family}; continue it as one.")
    if not FAMILIES[now.family].same_model(base, saved.run.shape, now.run.shape):
        raise ConfigError("the model's shape cannot change on --resume; choose another name.")


def _sequences(run: TrainRun, store: TokenStore) -> PackedDataset:
    """The training sequences of all steps, every pass in another order; :class:`DataError` if there is too little."""
    count = _total_steps(run, store) * run.batch_size * run.gradient_accumulation_steps
    return PackedDataset(store, run.seq_len, run.seed, count, linear=run.linear, start=run.start_offset)


def _total_steps(run: TrainRun, store: TokenStore) -> int:
    per_step = run.batch_size * run.gradient_accumulation_steps
    passes = sum(domain.train.tokens for domain in store.info.domains) // run.seq_len * run.max_epochs
    return run.max_steps or max(1, passes // per_step)


def check_place(run: TrainRun) -> None:
    """Raise where something trained is in the way of a new run, or nothing is there to resume."""
    bundle = run.bundle
    places = {Brain(run.root, bundle).checkpoint_folder, bundle / run.checkpoint_dir}
    if run.resume:
        if attached := read_list(bundle):
            raise ConfigError(
                f"expert {attached[0]['expert_id']} is attached to these weights; detach it before you train them on."
            )
        if not list_checkpoints(bundle / run.checkpoint_dir):
            instead = "leave out --resume to begin it again, or choose another name"
            if any(bundle.glob("model*.safetensors")):
                instead = "--student-init starts a new brain from its weights"
            raise CheckpointError(f"{bundle} has no checkpoint to continue from; {instead}.")
    elif any(map(list_checkpoints, places)) or any(bundle.glob("model*.safetensors")):
        raise ConfigError(f"the brain {bundle} exists already; add --resume to continue it or choose another name.")


def _make_trainer(
    loaded: LoadedBrain,
    run: TrainRun,
    store: TokenStore,
    sequences: PackedDataset,
    show: Show,
    goals: GoalTraining | None,
    use_cpu: bool,
) -> Any:
    from torch.utils.data import DataLoader

    bundle, tokenizer = loaded.brain.path, loaded.tokenizer
    turn_on, goals_key = None, ""
    if goals is not None and run.goals.wanted:
        turn_on, goals_key = goals.start(loaded, run.goals)
    length = min(run.seq_len, run.chunk_size or 10**9)
    evaluated = [domain.name for domain in store.info.domains if domain.heldout.documents and run.eval_tokens]
    return ChronoMoETrainer(
        loaded.model,
        run.training(
            max_steps=_total_steps(run, store),
            checkpoint_dir=str(bundle / run.checkpoint_dir),
            log_file=run.log_file or str(bundle / METRICS),
        ),
        DataLoader(sequences, batch_size=run.batch_size),
        {name: heldout_windows(store, name, length, run.eval_tokens) for name in evaluated} or None,
        sample=lambda trained: LoadedBrain(loaded.brain, trained, tokenizer).sample(max_new_tokens=40),
        save_extra=tokenizer.save_pretrained,
        show=show,
        stop_after=run.stop_after,
        goals=turn_on,
        goals_key=goals_key,
        use_cpu=use_cpu,
    )


def _results(trainer: Any, store: TokenStore, eval_tokens: int) -> dict[str, Any]:
    results: dict[str, Any] = trainer.train()
    return results | {"unigram": unigram_bits_per_byte(store, eval_tokens) if eval_tokens else {}}


def _publish(trainer: Any, bundle: Path) -> None:
    """Put the final model and its sidecars into the bundle itself, file by file, each in one step."""
    final = trainer.save_checkpoint()
    tokenizer_files = {path.name for path in final.glob("*token*")} | set(TOKENIZER_FILES)
    for path in final.iterdir():
        if (
            path.name in tokenizer_files
            or path.name in ("config.json", "generation_config.json")
            or (path.name.startswith("model") and path.suffix in (".safetensors", ".json"))
        ):
            temporary = bundle / f".{path.name}.new"
            with disk_full_explained(bundle / path.name):
                shutil.copyfile(path, temporary)
            temporary.replace(bundle / path.name)
    sidecars.copy(final, bundle)
