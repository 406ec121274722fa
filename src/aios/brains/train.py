"""Train a brain: base model + prepared data + settings to a bundle."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aios.brains.brain import METRICS, Brain
from aios.brains.build import build_model
from aios.brains.card import write_card
from aios.brains.families import FAMILIES
from aios.brains.loaded import LoadedBrain, load_tokenizer
from aios.brains.plan import describe_plan
from aios.brains.run_file import read_run, write_run
from aios.brains.settings import Run
from aios.data.tokenizers import tokenizer_fingerprint
from aios.goals.memory import forget, read_memory
from aios.goals.under import goals_for_training, goals_to_train_under
from aios.store.goals import Goals
from aios.workspace import Workspace
from chronomoe import sidecars
from chronomoe.data.token_store import TokenStore, unigram_bits_per_byte
from chronomoe.data.windows import PackedDataset, heldout_windows
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import disk_full_explained
from chronomoe.training.checkpoint import list_checkpoints

Show = Callable[[str], None]


def train(run: Run, show: Show = print) -> dict[str, Any]:
    """Train (or plan, or resume) as ``run`` says; returns the trainer's results, ``bundle`` and ``unigram``.

    Raises :class:`ConfigError` for settings that cannot work or a name that is taken, :class:`DataError` for data that
    cannot be used, :class:`CheckpointError` when resuming from something missing, damaged or of another make.
    """
    workspace = Workspace(run.settings.root)
    bundle = run.bundle or workspace.brain(run.settings.name, run.family)
    brain = Brain(run.settings.root, bundle)
    if run.goals.goals_forget and not run.settings.resume:
        raise ConfigError("--goals-forget is for a brain that was trained under goals; give --resume too.")
    if run.settings.resume:
        run, changes = run.continuing(saved := read_run(bundle))
        if not run.goals.wanted and not run.goals.goals_forget:
            run = dataclasses.replace(run, goals=read_memory(brain).flags)
        check_place(bundle, run)  # before its data is missed, which a brain that was not trained has none of
    if not (bundle / run.training.checkpoint_dir).resolve().is_relative_to(bundle.resolve()):
        raise ConfigError(f"checkpoint_dir is {run.training.checkpoint_dir}; name a folder inside the brain.")
    base = run.settings.model or workspace.base_model
    if not (base / "config.json").is_file():
        raise ConfigError(f"there is no base model {base}; `{workspace.command('init')}` makes one.")
    default_data = FAMILIES[run.family].default_data(run.settings.root, bundle)
    store = TokenStore.open(run.settings.data or default_data)
    if run.goals.goal_domain:
        store = store.favouring(run.goals.goal_domain, run.goals.goal_domain_weight)
    fingerprints = {
        "tokenizer_fingerprint": _matching_tokenizer(base, store),
        "data_fingerprint": store.info.fingerprint,
    }
    if run.settings.resume:
        _refuse_changed(saved, fingerprints, run, base)
        for name, (old, new) in changes.items():
            show(f"{name}: {new} (was {old})")
    if run.goals.wanted:
        goals_to_train_under(brain, load_tokenizer(base), run.goals)
    sequences = _sequences(run, store)
    model = build_model(base, run, store)
    if run.settings.dry_run:
        check_place(bundle, run)
        for line in describe_plan(model, run, store):
            show(line)
        return {}
    with brain.lock():
        check_place(bundle, run)
        if not run.settings.resume:
            (bundle / METRICS).unlink(missing_ok=True)  # of a run that ended before it saved anything
        if run.settings.default_goal and not run.settings.resume:
            Goals(run.settings.root).add(run.settings.default_goal, source="training")
        trainer, tokenizer = _make_trainer(model, run, store, sequences, brain, base, show)
        if run.settings.resume:
            trainer.load_checkpoint("latest")
            if trainer.state.step > trainer.total_steps:
                raise ConfigError(
                    f"the brain has done {trainer.state.step} steps, more than the {trainer.total_steps} asked for."
                )
        if run.goals.goals_forget:
            forget(brain)
        write_run(bundle, run.to_json(), fingerprints)  # only now: settings that fail must not become the brain's
        results = _results(trainer, store, run.settings.eval_tokens) | {"bundle": bundle}
        if results["finished"]:
            _publish(trainer, tokenizer, bundle)
            published = {"published_step": results["global_step"], "bits_per_byte": results["evaluation"].get("mean")}
            write_run(bundle, run.to_json() | published, fingerprints)
            write_card(bundle, model, run, store, results)
            show(f"Wrote {bundle}")
        return results


def _matching_tokenizer(base: Path, store: TokenStore) -> str:
    fingerprint = tokenizer_fingerprint(base)
    if fingerprint != store.info.tokenizer_fingerprint:
        raise ConfigError(
            f"the data was prepared with another tokenizer than {base} has; "
            "run `aios data prepare` with --tokenizer on that folder."
        )
    return fingerprint


def _refuse_changed(saved: dict[str, Any], fingerprints: dict[str, str], run: Run, base: Path) -> None:
    for name, value in fingerprints.items():
        if saved.get(name) != value:
            what = name.removesuffix("_fingerprint")
            raise CheckpointError(f"the {what} changed since this brain was begun; restore it or train a new brain.")
    if saved.get("family", "mixtral") != run.family:
        raise ConfigError(f"{run.settings.name} is a brain of the family {saved['family']}; continue it as one.")
    family = FAMILIES[run.family]
    if not family.same_model(base, family.shape(**saved["shape"]), run.shape):
        raise ConfigError("the model's shape cannot change on --resume; choose another name.")


def _sequences(run: Run, store: TokenStore) -> PackedDataset:
    """The training sequences of the whole run, every pass in another order; :class:`DataError` if text is wanting."""
    training = run.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    settings = run.settings
    return PackedDataset(
        store,
        settings.seq_len,
        training.seed,
        _total_steps(run, store) * per_step,
        linear=settings.linear,
        start=settings.start_offset,
    )


def _total_steps(run: Run, store: TokenStore) -> int:
    training = run.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    passes = sum(domain.train.tokens for domain in store.info.domains) // run.settings.seq_len * training.max_epochs
    return training.max_steps or max(1, passes // per_step)


def check_place(bundle: Path, run: Run) -> None:
    """Nothing trained may be in the way of a new run, and something must be there to resume."""
    places = {Brain(run.settings.root, bundle).checkpoint_folder, bundle / run.training.checkpoint_dir}
    if run.settings.resume:
        if attached := sidecars.read_list(bundle):
            raise ConfigError(
                f"expert {attached[0]['expert_id']} is attached to these weights; detach it before you train them on."
            )
        if not list_checkpoints(bundle / run.training.checkpoint_dir):
            instead = "leave out --resume to begin it again, or choose another name"
            if any(bundle.glob("model*.safetensors")):
                instead = "--student-init starts a new brain from its weights"
            raise CheckpointError(f"{bundle} has no checkpoint to continue from; {instead}.")
    elif any(map(list_checkpoints, places)) or any(bundle.glob("model*.safetensors")):
        raise ConfigError(f"the brain {bundle} exists already; add --resume to continue it or choose another name.")


def _make_trainer(
    model: Any, run: Run, store: TokenStore, sequences: PackedDataset, brain: Brain, base: Path, show: Show
) -> tuple[Any, Any]:
    """The trainer of a run, and its tokenizer."""
    from torch.utils.data import DataLoader

    from chronomoe.training.trainer import ChronoMoETrainer

    settings, training, bundle = run.settings, run.training, brain.path
    tokenizer = load_tokenizer(base)
    goals, goals_key = None, ""
    if run.goals.wanted:
        goals, goals_key = goals_for_training(LoadedBrain(brain, model, tokenizer), run.goals)
    trainer = ChronoMoETrainer(
        model,
        dataclasses.replace(
            training,
            max_steps=_total_steps(run, store),
            checkpoint_dir=str(bundle / training.checkpoint_dir),
            log_file=training.log_file or str(bundle / METRICS),
        ),
        DataLoader(sequences, batch_size=training.batch_size),
        {
            name: heldout_windows(
                store, name, min(settings.seq_len, training.chunk_size or 10**9), settings.eval_tokens
            )
            for name in (_evaluated(store) if settings.eval_tokens else [])
        }
        or None,
        sample=lambda trained: LoadedBrain(brain, trained, tokenizer).sample(max_new_tokens=40),
        save_extra=tokenizer.save_pretrained,
        show=show,
        stop_after=settings.stop_after,
        goals=goals,
        goals_key=goals_key,
    )
    return trainer, tokenizer


def _evaluated(store: TokenStore) -> list[str]:
    return [domain.name for domain in store.info.domains if domain.heldout.documents]


def _results(trainer: Any, store: TokenStore, eval_tokens: int) -> dict[str, Any]:
    results: dict[str, Any] = trainer.train()
    return results | {"unigram": unigram_bits_per_byte(store, eval_tokens) if eval_tokens else {}}


def _publish(trainer: Any, tokenizer: Any, bundle: Path) -> None:
    """Put the final model and its sidecars into the bundle itself, file by file, each in one step."""
    final = trainer.files.folder / f"step_{trainer.state.step}"
    tokenizer_files = {path.name for path in final.glob("*token*")}
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
