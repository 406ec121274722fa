"""expert.safetensors: one expert with everything needed to attach it safely; safetensors and JSON, never a pickle.

The header's metadata holds one JSON text, ``chronomoe_expert``, and the sha256 of that text and of every tensor
(name, dtype, shape, bytes): a file that was cut, changed or mixed up is refused before anything is built from it. The
digest is a safeguard against damage, not a signature.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from chronomoe.errors import CheckpointError
from chronomoe.experts.attachment import base_state
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.record import DomainRecord
from chronomoe.hosts.attach import moe_layers
from chronomoe.storage import whole_file

FORMAT, VERSION = "chronomoe-expert", 1
_MAX_HEADER_BYTES = 1 << 20
REQUIRED = {
    "expert_uid": str, "expert_id": str, "created": str, "base": dict, "tokenizer_fingerprint": str, "layers": list,
    "width": int, "gate_layers": list, "training": dict, "calibration": dict, "metrics": dict, "goals": list,
}  # fmt: skip
"""What every header says, and of which type."""


def base_fingerprint(model: Any) -> str:
    """sha256 of a model's own weights: names, dtypes, shapes and bytes, in the order of names."""
    return _digest(sorted(base_state(model).items()))


def base_of(model: Any) -> dict[str, Any]:
    """What an expert's file says of the model it was trained in."""
    config = model.config
    return {
        "fingerprint": base_fingerprint(model),
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "act": config.hidden_act,
        "moe_layers": len(moe_layers(model)),
    }


def save_expert(expert: DomainExpert, header: dict[str, Any], path: Path) -> None:
    """Write an expert in one step; ``header`` needs the :data:`REQUIRED` fields that the expert itself lacks."""
    header = {
        **header,
        "format": FORMAT,
        "version": VERSION,
        "expert_uid": expert.uid,
        "expert_id": expert.expert_id,
        "layers": expert.layer_numbers,
        "width": expert.width,
        "gate_layers": list(expert.gate.layers),
    }
    _check_fields(header, path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in (expert.state_dict() | expert.own_gate).items()}
    if expert.record is not None:
        tensors |= expert.record.tensors()
    text = json.dumps(header, sort_keys=True)
    metadata = {"chronomoe_expert": text, "sha256": _digest_of_all(text, tensors)}
    with whole_file(path) as file:
        file.write(save(tensors, metadata))


def read_expert(path: Path) -> tuple[DomainExpert, dict[str, Any]]:
    """An expert from its file, in evaluation mode, and its header.

    Raises :class:`CheckpointError` for a file that is missing, cut, changed, of another kind or of a newer version, or
    that holds values that are not finite.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the expert file {path} cannot be read ({error.strerror}).") from error
    header, digest, text = _header(data, path)
    try:
        tensors = load(data)
    except Exception as error:  # whatever the library raises for what it does not understand
        raise CheckpointError(f"the expert file {path} is damaged ({error}); put a copy back.") from error
    if _digest_of_all(text, tensors) != digest:
        raise CheckpointError(f"the expert file {path} was changed after it was written; put a copy back.")
    bad = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if bad == ["gate.threshold"] and bool((tensors["gate.threshold"] == math.inf).all()):
        bad = []  # a gate that never opens
    if bad:
        raise CheckpointError(f"the expert file {path} holds values that are not finite ({bad[0]}); train it again.")
    try:
        expert = DomainExpert(
            header["expert_id"],
            hidden_size=header["base"]["hidden_size"],
            width=header["width"],
            layers=header["layers"],
            act=header["base"]["act"],
            gate_layers=header["gate_layers"],
            uid=header["expert_uid"],
        )
        expert.record = DomainRecord.taken_from(tensors, expert.gate.direction.numel() + 1)
        expert.load_state_dict(tensors)
        if not 0 <= float(expert.gate.leak) <= 1:
            raise ValueError(f"the gate's leak is {float(expert.gate.leak):g}")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tensors in {path} are not those of its header: {reason}") from error
    return expert.eval(), header


def refuse_misfit(
    header: dict[str, Any], model: Any, tokenizer_fingerprint: str | None, *, force: bool = False
) -> None:
    """:class:`CheckpointError` for an expert of another base or tokenizer; ``force`` lets another fingerprint pass."""
    theirs, mine, name = header["base"], base_of(model), header["expert_id"]
    for field in ("hidden_size", "act", "moe_layers"):
        if theirs.get(field) != mine[field]:
            raise CheckpointError(
                f"expert {name} does not fit: its base has {field} {theirs.get(field)}, this {mine[field]}."
            )
    if force:
        return
    if theirs.get("fingerprint") != mine["fingerprint"]:
        raise CheckpointError(
            f"expert {name} was trained in another base: the weights differ. Attach it to that one or train it again; "
            "--force attaches it all the same."
        )
    if tokenizer_fingerprint is not None and header["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise CheckpointError(f"expert {name} was trained with another tokenizer; --force attaches it all the same.")


def _header(data: bytes, path: Path) -> tuple[dict[str, Any], str, str]:
    """The metadata, checked before the library sees the file."""
    foreign = CheckpointError(f"{path} is not an expert file of chronomoe.")
    try:
        (length,) = struct.unpack("<Q", data[:8])
        if length > min(_MAX_HEADER_BYTES, len(data)):
            raise foreign
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        text, digest = metadata["chronomoe_expert"], metadata["sha256"]
        header = json.loads(text)
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise foreign from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise foreign
    if header.get("version") != VERSION:
        raise CheckpointError(f"{path} is of version {header.get('version')}, which this chronomoe does not read.")
    _check_fields(header, path)
    return header, digest, text


def _check_fields(header: dict[str, Any], path: Path) -> None:
    for name, kind in REQUIRED.items():
        if not isinstance(header.get(name), kind):
            raise CheckpointError(f"the header of {path} lacks {name}.")
    for name, form in (("expert_uid", "[0-9a-f]{32}"), ("expert_id", "[A-Za-z0-9_-]{1,64}")):
        if not re.fullmatch(form, header[name]):
            raise CheckpointError(f"the header of {path} has an impossible {name}: {header[name][:80]!r}.")


def _digest_of_all(text: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(text.encode() + _digest(sorted(tensors.items())).encode()).hexdigest()


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
