"""Train a brain: base model + prepared data + settings to a bundle."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aios.brains.bundle import exclusive, read_run, write_run
from aios.brains.card import write_card
from aios.brains.plan import describe_plan
from aios.brains.settings import Run
from aios.data.tokenizers import tokenizer_fingerprint
from aios.workspace import Workspace
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.training.token_store import TokenStore, unigram_bits_per_byte

Show = Callable[[str], None]


def train(run: Run, show: Show = print) -> dict[str, Any]:
    """Train (or plan, or resume) as ``run`` says; returns the trainer's results, ``bundle`` and ``unigram``.

    Raises :class:`ConfigError` for settings that cannot work or a name that is taken, :class:`DataError` for data that
    cannot be used, :class:`CheckpointError` when resuming from something missing, damaged or of another make.
    """
    workspace = Workspace(run.settings.root)
    bundle = workspace.brain(run.settings.name)
    if run.settings.resume:
        run, changes = run.continuing(saved := read_run(bundle))
        for name, (old, new) in changes.items():
            show(f"{name}: {new} (was {old})")
    base = run.settings.model or workspace.base_model
    store = TokenStore.open(run.settings.data or workspace.prepared)
    fingerprints = {
        "tokenizer_fingerprint": _matching_tokenizer(base, store),
        "data_fingerprint": store.info.fingerprint,
    }
    if run.settings.resume:
        _refuse_changed(saved, fingerprints, run)
    model = build_model(base, run, store)
    if run.settings.dry_run:
        for line in describe_plan(model, run, store):
            show(line)
        return {}
    if not run.settings.resume and (bundle / "run.json").exists():
        raise ConfigError(f"the brain {bundle} exists already; add --resume to continue it or choose another --name.")
    with exclusive(bundle):
        write_run(bundle, run.to_json(), fingerprints)
        return _train(model, run, store, bundle, base, show)


def build_model(base: Path, run: Run, store: TokenStore) -> Any:
    """The model to train: the base model's weights if it has any, else freshly initialised from its configuration."""
    from transformers import set_seed

    from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig

    if not (base / "config.json").is_file():
        raise ConfigError(f"there is no base model {base}; `aios init` makes one.")
    shape = run.shape.given()
    config = MixtralConfig.from_pretrained(base)
    steering = {**(config.steering or {}), "capacity_factor": run.settings.moe_capacity_factor}
    set_seed(run.training.seed)
    if any(base.glob("model*.safetensors")):
        if shape:
            raise ConfigError(f"{base} has weights, so its shape is fixed; leave out {', '.join(shape)}.")
        config.steering = steering
        return ChronovisorMixtralForCausalLM.from_pretrained(base, config=config)
    values = {**config.to_dict(), **_without_derived(config, shape)}
    values |= {"vocab_size": store.info.vocab_size, "eos_token_id": store.info.separator_id, "steering": steering}
    values |= {"bos_token_id": store.info.separator_id, "pad_token_id": None}
    return ChronovisorMixtralForCausalLM(MixtralConfig(**values))


def _without_derived(config: Any, shape: dict[str, int]) -> dict[str, Any]:
    # A changed width drags along what was derived from the old one.
    names = {config.attribute_map.get(name, name): value for name, value in shape.items()}
    derived: dict[str, Any] = {}
    if "hidden_size" in names:
        derived = {"intermediate_size": None, "num_attention_heads": None, "num_key_value_heads": None}
    if names.keys() & {"hidden_size", "num_attention_heads"}:
        derived["head_dim"] = None
    return derived | names


def _matching_tokenizer(base: Path, store: TokenStore) -> str:
    fingerprint = tokenizer_fingerprint(base)
    if fingerprint != store.info.tokenizer_fingerprint:
        raise ConfigError(
            f"the data was prepared with another tokenizer than {base} has; "
            "run `aios data prepare` with --tokenizer on that folder."
        )
    return fingerprint


def _refuse_changed(saved: dict[str, Any], fingerprints: dict[str, str], run: Run) -> None:
    for name, value in fingerprints.items():
        if saved.get(name) != value:
            what = name.removesuffix("_fingerprint")
            raise CheckpointError(f"the {what} changed since this brain was begun; restore it or train a new brain.")
    if saved["shape"] != dataclasses.asdict(run.shape):
        raise ConfigError("the model's shape cannot change on --resume; choose another --name.")


def _train(model: Any, run: Run, store: TokenStore, bundle: Path, base: Path, show: Show) -> dict[str, Any]:
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from aios.brains.generate import sample_text
    from chronomoe.training.loading import PackedDataset, heldout_windows
    from chronomoe.training.trainer import ChronoMoETrainer

    settings, training = run.settings, run.training
    tokenizer = AutoTokenizer.from_pretrained(base)
    total = sum(domain.train.tokens for domain in store.info.domains) // settings.seq_len
    steps = training.max_steps or training.max_epochs * total
    samples = steps * training.batch_size * training.gradient_accumulation_steps if training.max_steps else total
    dataset = PackedDataset(store, settings.seq_len, training.seed, max(1, samples))
    held_out = [domain.name for domain in store.info.domains if domain.heldout.documents]
    trainer = ChronoMoETrainer(
        model,
        dataclasses.replace(
            training,
            checkpoint_dir=str(bundle / training.checkpoint_dir),
            log_file=training.log_file or str(bundle / "metrics.jsonl"),
        ),
        DataLoader(dataset, batch_size=training.batch_size),
        {name: heldout_windows(store, name, settings.seq_len, settings.eval_tokens) for name in held_out} or None,
        sample=lambda trained: sample_text(trained, tokenizer, max_new_tokens=40),
        save_extra=tokenizer.save_pretrained,
        show=show,
        stop_after=settings.stop_after,
    )
    if settings.resume:
        trainer.load_checkpoint("latest")
    unigram = unigram_bits_per_byte(store)
    results = trainer.train() | {"bundle": bundle, "unigram": {name: unigram[name] for name in held_out}}
    if results["finished"]:
        _publish(trainer, tokenizer, bundle)
        write_card(bundle, model, run, store, results)
        show(f"Wrote {bundle}")
    return results


def _publish(trainer: Any, tokenizer: Any, bundle: Path) -> None:
    """Put the final model into the bundle itself, file by file, each whole."""
    final = trainer.checkpoint_dir / f"step_{trainer.state.step}"
    tokenizer_files = {path.name for path in final.glob("*token*")}
    for path in final.iterdir():
        if (
            path.name in tokenizer_files
            or path.name in ("config.json", "generation_config.json")
            or (path.name.startswith("model") and path.suffix in (".safetensors", ".json"))
        ):
            temporary = bundle / f".{path.name}.new"
            shutil.copyfile(path, temporary)
            temporary.replace(bundle / path.name)
