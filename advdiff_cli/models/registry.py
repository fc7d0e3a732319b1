"""Where a model is asked for: a folder, a bundled name, a Hub id or what others made; and what is recorded about it."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from advdiff_cli.data.provenance import KEY, Provenance, canonical, digest, parse, parse_object
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.classifiers import (
    CONFIG,
    WEIGHTS,
    Classifier,
    ClassifierConfig,
    load_classifier,
    load_tiatoolbox,
)
from advdiff_cli.models.ddpm import CARD, PICKLED_UNET, UNET_WEIGHTS, Ddpm, build_ddpm, load_card, load_ddpm
from advdiff_cli.models.external import from_callable, read_weights, source_digest

BUNDLED = Path(__file__).resolve().parent.parent / "weights"


def find_classifier(name: str) -> Path:
    """Return the folder of a classifier named by folder, bundled name or Hub id."""
    return _find(name, "classifier", WEIGHTS)


def find_ddpm(name: str, *, allow_pickle: bool = False) -> Path:
    """Return the folder of a diffusion model named by folder, bundled name or Hub id."""
    return _find(name, "diffusion model", UNET_WEIGHTS, allow_pickle=allow_pickle)


def frozen_classifier(name: str, device: torch.device, *, allow_pickle: bool = False) -> tuple[nn.Module, str]:
    """Return the classifier called `name`, in eval mode, its parameters without gradients, and its fingerprint.

    Args:
        name: A folder, bundled name or Hub id; a file of TIAToolbox's weights, BACKBONE-pcam.pth or .safetensors; or
            module:callable, which returns a torch module from images in [0, 1] to one or two logits.
        device: Where it is to compute.
        allow_pickle: Whether a .pth may be read.

    Raises:
        AdvdiffError: there is none, or it is not whole.
    """
    model: nn.Module
    if Path(name).is_file():
        model = load_tiatoolbox(Path(name), allow_pickle=allow_pickle)
        told = model.config.arch
    elif re.fullmatch(r"[\w.]+:[\w.]+", name):
        model, told = from_callable(name), f"{name} {source_digest(name)}"
    else:
        folder = find_classifier(name)
        model, told = load_classifier(folder), ""
    made_of = fingerprint(folder) if not told else digest([told.encode(), *_tensors(_everything(model))])
    model = model.to(device)
    if isinstance(model, Classifier):
        model = model.to(memory_format=torch.channels_last)  # the faster layout, which other modules may not take
    return model.requires_grad_(False), made_of


def bundled(kind_file: str) -> list[str]:
    """Return the names of the bundled models that hold `kind_file`."""
    return sorted(p.relative_to(BUNDLED).parts[0] for p in BUNDLED.glob(f"*/{kind_file}"))


def is_model(folder: Path) -> bool:
    """Tell whether a folder holds a classifier or a diffusion model."""
    return (folder / WEIGHTS).is_file() or (folder / UNET_WEIGHTS).is_file()


def list_bundled() -> list[dict[str, Any]]:
    """Return name, kind, architecture and size in bytes of each bundled model."""
    found = []
    for name in bundled(WEIGHTS):
        found.append(
            {
                "name": name,
                "kind": "classifier",
                "arch": json.loads((BUNDLED / name / CONFIG).read_text())["arch"],
            }
        )
    for name in bundled(UNET_WEIGHTS):
        channels = json.loads((BUNDLED / name / "unet" / "config.json").read_text())["block_out_channels"]
        factor = load_card(BUNDLED / name).space_to_depth
        found.append({"name": name, "kind": "ddpm", "arch": f"U-Net {channels}, space-to-depth {factor}"})
    for model in found:
        model["bytes"] = sum(p.stat().st_size for p in (BUNDLED / model["name"]).rglob("*") if p.is_file())
    return found


def _find(name: str, kind: str, kind_file: str, *, allow_pickle: bool = False) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if (BUNDLED / name / kind_file).is_file():
        return BUNDLED / name
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _download(name, kind, allow_pickle)
    have = ", ".join(bundled(kind_file)) or "none"
    raise AdvdiffError(f"no {kind} called {name}: neither a folder nor a bundled model (these are: {have})")


def _download(name: str, kind: str, allow_pickle: bool) -> Path:
    """Return the local copy of a Hub repository's configuration and weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    pickled = [PICKLED_UNET] if allow_pickle else []
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *pickled]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise AdvdiffError(
            f"no {kind} called {name}: no folder, no bundled model, and the Hub did not give it ({reason})"
        ) from None


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model: configuration and tensors, and not what is recommended or told about it."""
    return digest(_meaning(folder))


def _meaning(folder: Path) -> Iterator[bytes]:
    """Yield what a model's result depends on."""
    card = asdict(load_card(folder))
    told = {k: card[k] for k in ("space_to_depth", "max_t", "data_range")}
    if card["index_offset"]:
        told["index_offset"] = card["index_offset"]
    yield canonical(told).encode()
    for path in sorted(folder.rglob("*config.json")):
        told = {k: v for k, v in parse_object(path.read_text(), path).items() if not k.startswith("_")}
        yield f"\n{path.relative_to(folder).as_posix()} {canonical(told)}".encode()
    whole = sorted(folder.rglob("*.safetensors"))
    for path in whole or sorted(folder.glob(PICKLED_UNET)):
        yield from _tensors(read_weights(path, allow_pickle=True))  # the model was loaded from them


def _everything(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a model, those that it does not save too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _tensors(state: dict[str, Tensor]) -> Iterable[bytes]:
    for name, tensor in sorted(state.items()):
        yield f"\n{name} {tensor.dtype} {list(tensor.shape)}".encode()
        yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def initial_classifier(init: str | None, config: ClassifierConfig, seed: int, shape: tuple[int, int]) -> Classifier:
    """Return the classifier a fit starts from: fresh weights of (config, seed), or those of the model `init`.

    Raises:
        AdvdiffError: `init` is of another architecture, or the architecture does not take patches of `shape` (H, W).
    """
    model = _begun_classifier(init, config, seed)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *shape))
    except (AssertionError, RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise AdvdiffError(f"{config.arch} does not take patches of {shape[0]}x{shape[1]} ({reason})") from None
    return model


def _begun_classifier(init: str | None, config: ClassifierConfig, seed: int) -> Classifier:
    if init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # torchvision initialises from the global stream; it is put back on leaving
            return Classifier(config)
    model = load_classifier(find_classifier(init))
    if model.config.arch != config.arch:
        raise AdvdiffError(f"--init {init} is a {model.config.arch}; give --arch {model.config.arch}")
    return model


def initial_ddpm(
    init: str | None, preset: str, shapes: Sequence[tuple[int, int]], max_t: float, seed: int,
    data_range: tuple[float, float] = (-1.0, 1.0), *, allow_pickle: bool = False,
) -> Ddpm:  # fmt: skip
    """Return the diffusion model a fit starts from: fresh weights of (preset, seed), or those of the model `init`."""
    model = build_ddpm(preset, shapes[0][0], max_t, seed, data_range)
    for height, width in shapes:
        if height % model.multiple or width % model.multiple:
            raise AdvdiffError(
                f"patches of {height}x{width} do not fit preset {preset}: sides must be multiples of {model.multiple}"
            )
    if init is None:
        return model
    start = load_ddpm(find_ddpm(init, allow_pickle=allow_pickle), allow_pickle=allow_pickle)
    if list(start.unet.config.block_out_channels) != list(model.unet.config.block_out_channels):
        raise AdvdiffError(f"--init {init} is not of preset {preset}; give its own --preset")
    if start.card.data_range != data_range:
        low, high = start.card.data_range
        raise AdvdiffError(
            f"--init {init} saw pixels scaled to [{low:g}, {high:g}]; give --data-range {low:g},{high:g}"
        )
    return start


def recorded_provenance(folder: Path) -> Provenance | None:
    """Return the provenance of a model folder, or None where there is none."""
    try:
        if (folder / CARD).is_file():
            return parse_object((folder / CARD).read_text(), folder / CARD).get("provenance")
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, "pt") as file:
                return parse((file.metadata() or {})[KEY], folder / WEIGHTS)
    except (KeyError, SafetensorError, AdvdiffError):
        return None
    return None


def recorded_recipe(folder: Path) -> Provenance | None:
    """Return the recipe of a model folder, or None where there is none."""
    known = recorded_provenance(folder)
    return None if known is None else known.get("recipe")


def training_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a fit."""
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
