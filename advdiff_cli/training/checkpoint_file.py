"""Checkpoints: safetensors files of tensors and a JSON state, with a checksum; and an optimizer's state in them."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from advdiff_cli.data.atomic_files import name_write_errors, sync
from advdiff_cli.data.provenance import JsonObject, canonical_json

if TYPE_CHECKING:  # imported where it is used, so that a model that is up to date is told at once
    import torch
    from torch import Tensor

_STATE = "state"
_CHECKSUM = "checksum"
_LOGGED = "logged"  # bytes of the log when a checkpoint was written


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, object], logged: int) -> None:
    """Write a checkpoint, and the bytes that the log has; it replaces the old one when it is complete."""
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".new")
    copies = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    checks = {_CHECKSUM: _checksum(copies), _LOGGED: str(logged)}
    with name_write_errors(path):
        save_file(copies, temporary, {_STATE: canonical_json(dict(state)), **checks})
    sync(temporary)
    os.replace(temporary, path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """Return the tensors and the state of a checkpoint that `is_whole`."""
    tensors, metadata = _read(path)
    state: JsonObject = json.loads(metadata[_STATE])
    return tensors, state


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return tensors, file.metadata() or {}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    import torch

    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return str(crc)


def is_whole(checkpoint: Path, logged: int) -> bool:
    """Return whether a checkpoint is as it was written, and the log of `logged` bytes is no shorter than it was then.

    Checkpoints of version 0.1.0 record neither.
    """
    try:
        tensors, metadata = _read(checkpoint)
        json.loads(metadata[_STATE])
        if int(metadata.get(_LOGGED, 0)) > logged:
            return False
    except (OSError, SafetensorError, KeyError, ValueError):
        return False
    found = _checksum(tensors)
    return metadata.get(_CHECKSUM, found) == found


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's per-parameter state as named tensors."""
    import torch

    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(v) for i, entry in state.items() for name, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore a state of `optimizer_tensors`, laid out in memory as its parameters, which fused steps on a GPU need."""
    import torch

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            like = parameters[int(i)]
            alike = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype)
            state.setdefault(int(i), {})[name] = alike.copy_(value) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under `prefix.`, without the prefix."""
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
