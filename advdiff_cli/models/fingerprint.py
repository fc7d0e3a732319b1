"""Fingerprints of models: what their results depend on, and nothing else."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from advdiff_cli.data.provenance import canonical_json, digest, read_json_object
from advdiff_cli.data.safetensors_file import read_header
from advdiff_cli.models.card import PICKLED_UNET, UNET_WEIGHTS, load_card
from advdiff_cli.models.classifier_config import WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor, nn

_TORCH_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
}
"""Types in a safetensors header -> their names in torch."""


def folder_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model folder: its configuration and tensors, without recommended settings."""
    return digest(_folder_parts(folder))


def module_fingerprint(description: str, module: "nn.Module") -> str:
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
        raw = read_json_object(path)
        kept = {k: v for k, v in raw.items() if not k.startswith("_") and k != "size"}  # which is for a warning only
        yield f"\n{path.relative_to(folder).as_posix()} {canonical_json(kept)}".encode()
    for name in (WEIGHTS, UNET_WEIGHTS):  # what is loaded, and no other file in the folder
        if (folder / name).is_file():
            yield from _stored_parts(folder / name)
    if (folder / PICKLED_UNET).is_file() and not (folder / UNET_WEIGHTS).is_file():
        from advdiff_cli.models.external import read_weights

        yield from _tensor_parts(read_weights(folder / PICKLED_UNET, allow_pickle=True))  # loaded from this file before


def _stored_parts(path: Path) -> Iterable[bytes]:
    """Return the parts of a safetensors file, as `_tensor_parts` gives them for its tensors, without torch."""
    header, _, offset = read_header(path)
    with path.open("rb") as file:
        for name, stored in sorted(header.items()):
            start, stop = stored["data_offsets"]
            dtype = _TORCH_NAMES.get(stored["dtype"], stored["dtype"])
            yield f"\n{name} torch.{dtype} {stored['shape']}".encode()
            file.seek(offset + start)
            yield file.read(stop - start)


def _tensor_parts(state: "dict[str, Tensor]") -> Iterable[bytes]:
    import torch

    for name, tensor in sorted(state.items()):
        yield f"\n{name} {tensor.dtype} {list(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
