"""Fingerprints of models: what their results depend on, and nothing else."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from advdiff_cli.data.provenance import canonical_json, digest, parse_json_object
from advdiff_cli.models.classifiers import WEIGHTS
from advdiff_cli.models.ddpm import PICKLED_UNET, UNET_WEIGHTS, load_card
from advdiff_cli.models.external import read_weights


def folder_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model folder: its configuration and tensors, without recommended settings."""
    return digest(_folder_parts(folder))


def module_fingerprint(description: str, module: nn.Module) -> str:
    """Return the fingerprint of a module: a description, its parameters and all of its buffers."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return digest([description.encode(), *_tensor_parts(tensors)])


def _folder_parts(folder: Path) -> Iterator[bytes]:
    card = asdict(load_card(folder))
    kept = {k: card[k] for k in ("space_to_depth", "max_t", "data_range")}
    if card["index_offset"]:
        kept["index_offset"] = card["index_offset"]
    yield canonical_json(kept).encode()
    for path in sorted(folder.rglob("*config.json")):
        kept = {k: v for k, v in parse_json_object(path.read_text(), path).items() if not k.startswith("_")}
        yield f"\n{path.relative_to(folder).as_posix()} {canonical_json(kept)}".encode()
    pickled = () if (folder / UNET_WEIGHTS).is_file() else (PICKLED_UNET,)
    for name in (WEIGHTS, UNET_WEIGHTS, *pickled):  # what is loaded, and no other file in the folder
        if (folder / name).is_file():
            yield from _tensor_parts(read_weights(folder / name, allow_pickle=True))  # already loaded from this file


def _tensor_parts(state: dict[str, Tensor]) -> Iterable[bytes]:
    for name, tensor in sorted(state.items()):
        yield f"\n{name} {tensor.dtype} {list(tensor.shape)}".encode()
        yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
