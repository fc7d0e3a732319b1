"""Find models by name: a folder, a bundled name, a Hub id, or a model made elsewhere; and read what they record."""

import json
import logging
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from advdiff_cli.data.provenance import (
    KEY,
    JsonObject,
    Provenance,
    parse_json_object,
    parse_provenance,
    read_json_object,
)
from advdiff_cli.errors import AdvdiffError, first_line
from advdiff_cli.models.card import CARD, PICKLED_UNET, UNET_WEIGHTS, load_card
from advdiff_cli.models.classifier_config import CONFIG, WEIGHTS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from advdiff_cli.models.ddpm import Ddpm

_log = logging.getLogger(__name__)

_CALLABLE = re.compile(r"[\w.]+:[\w.]+")  # module:callable
BUNDLED = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True)
class BundledModel:
    """A model that advdiff ships: name, kind (classifier or ddpm), architecture, and size in bytes."""

    name: str
    kind: str
    arch: str
    bytes: int

    def as_dict(self) -> JsonObject:
        """Return the fields."""
        return asdict(self)


def find_classifier(name: str) -> Path:
    """Return the folder of the classifier called `name`: a folder, bundled name or Hub id.

    Raises:
        AdvdiffError: There is none.
    """
    return _find(name, "classifier", WEIGHTS)


def find_ddpm(name: str, *, allow_pickle: bool = False) -> Path:
    """Return the folder of the diffusion model called `name`: a folder, bundled name or Hub id.

    Raises:
        AdvdiffError: There is none.
    """
    return _find(name, "diffusion model", UNET_WEIGHTS, allow_pickle=allow_pickle)


def classifier_fingerprint(name: str) -> str | None:
    """Return the fingerprint of the classifier called `name`, or None if it has to be loaded for that.

    Raises:
        AdvdiffError: There is no such classifier.
    """
    from advdiff_cli.models.fingerprint import folder_fingerprint

    if Path(name).is_file() or _CALLABLE.fullmatch(name):
        return None
    return folder_fingerprint(find_classifier(name))


def load_frozen_classifier(name: str, device: "torch.device", *, allow_pickle: bool = False) -> "tuple[nn.Module, str]":
    """Return the classifier called `name`, in eval mode and without parameter gradients, and its fingerprint.

    Args:
        name: A folder, bundled name or Hub id; a file of TIAToolbox's weights, BACKBONE-pcam.pth or .safetensors; or
            module:callable, which returns a torch module from images in [0, 1] to one or two logits.
        device: Where it computes.
        allow_pickle: Whether a .pth file may be read.

    Raises:
        AdvdiffError: There is no such classifier, or it is damaged.
    """
    import torch

    from advdiff_cli.models.classifiers import Classifier, load_tiatoolbox, read_classifier
    from advdiff_cli.models.external import load_callable, source_digest
    from advdiff_cli.models.fingerprint import folder_fingerprint, module_fingerprint

    model: nn.Module
    if Path(name).is_file():
        model = load_tiatoolbox(Path(name), allow_pickle=allow_pickle)
        fingerprint = module_fingerprint(model.config.arch, model)
    elif _CALLABLE.fullmatch(name):
        model, answers = load_callable(name)
        fingerprint = module_fingerprint(f"{name} {source_digest(name)} {answers}", model)
    else:
        folder = find_classifier(name)
        model, fingerprint = read_classifier(folder), folder_fingerprint(folder)
    model = model.to(device)
    if isinstance(model, Classifier):
        model = model.to(memory_format=torch.channels_last)  # faster; external modules may not support it
    return model.requires_grad_(False), fingerprint


def load_classifier(name: str | Path, *, allow_pickle: bool = False) -> "nn.Module":
    """Return the classifier called `name` on the CPU, in eval mode and without parameter gradients.

    It takes images (B, 3, H, W) in [0, 1] and returns logits (B, 2).

    Args:
        name: As for `load_frozen_classifier`.
        allow_pickle: Whether a .pth file may be read.

    Raises:
        AdvdiffError: There is no such classifier, or it is damaged.
    """
    import torch

    return load_frozen_classifier(str(name), torch.device("cpu"), allow_pickle=allow_pickle)[0]


def load_ddpm(name: str | Path, *, allow_pickle: bool = False) -> "Ddpm":
    """Return the diffusion model called `name` on the CPU, in eval mode: a folder, bundled name or Hub id.

    Raises:
        AdvdiffError: There is no such model, or it is damaged.
    """
    from advdiff_cli.models import ddpm

    return ddpm.read_ddpm(find_ddpm(str(name), allow_pickle=allow_pickle), allow_pickle=allow_pickle)


def bundled_names(weights: str) -> list[str]:
    """Return the names of the bundled models that have the file `weights`."""
    return sorted(p.relative_to(BUNDLED).parts[0] for p in BUNDLED.glob(f"*/{weights}"))


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a classifier or a diffusion model."""
    return (folder / WEIGHTS).is_file() or (folder / UNET_WEIGHTS).is_file()


def list_bundled() -> list[BundledModel]:
    """Return the bundled models, classifiers first."""
    found = []
    for name in bundled_names(WEIGHTS):
        arch = json.loads((BUNDLED / name / CONFIG).read_text())["arch"]
        found.append(BundledModel(name, "classifier", arch, _size(name)))
    for name in bundled_names(UNET_WEIGHTS):
        channels = json.loads((BUNDLED / name / "unet" / "config.json").read_text())["block_out_channels"]
        arch = f"U-Net {channels}, space-to-depth {load_card(BUNDLED / name).space_to_depth}"
        found.append(BundledModel(name, "ddpm", arch, _size(name)))
    return found


def _size(name: str) -> int:
    return sum(p.stat().st_size for p in (BUNDLED / name).rglob("*") if p.is_file())


def _find(name: str, kind: str, weights: str, *, allow_pickle: bool = False) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if (BUNDLED / name / weights).is_file():
        return BUNDLED / name
    path, colon, attribute = name.rpartition(":")
    if colon and (path.endswith(".py") or "/" in path):
        module = path.removesuffix(".py").strip("./").replace("/", ".")
        raise AdvdiffError(f"{name} is a path; give module:callable, such as {module}:{attribute}")
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _download(name, kind, allow_pickle)
    available = ", ".join(bundled_names(weights)) or "none"
    raise AdvdiffError(
        f"no {kind} is called {name}: it is neither a folder nor a bundled model (available: {available})"
    )


def _download(name: str, kind: str, allow_pickle: bool) -> Path:
    """Return the local copy of a Hub repository's configuration and weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    pickled = [PICKLED_UNET] if allow_pickle else []
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *pickled]))
    except Exception as e:  # of the network and the disk, which raise many kinds
        if isinstance(e, HFValidationError | RepositoryNotFoundError) and not isinstance(e, GatedRepoError):
            raise AdvdiffError(
                f"no {kind} is called {name}: it is neither a folder nor a bundled model, and the Hub does not have it "
                f"({first_line(e)})"
            ) from None
        raise AdvdiffError(
            f"{name} is neither a folder nor a bundled model, and could not be fetched from the Hub ({first_line(e)})"
        ) from None


def recorded_provenance(folder: Path) -> Provenance | None:
    """Return the provenance of a model folder, or None if there is none."""
    try:
        if (folder / CARD).is_file():
            return read_json_object(folder / CARD).get("provenance")
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, "numpy") as file:
                return parse_provenance((file.metadata() or {})[KEY], folder / WEIGHTS)
    except (KeyError, SafetensorError, AdvdiffError):
        return None
    return None


def recorded_recipe(folder: Path) -> Provenance | None:
    """Return the recipe of a model folder, or None if there is none."""
    known = recorded_provenance(folder)
    return None if known is None else known.get("recipe")


def training_log(folder: Path) -> list[JsonObject]:
    """Return the records of training.jsonl in a model folder, without damaged ones, which are told."""
    path, records = folder / "training.jsonl", []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        with suppress(AdvdiffError):
            records.append(parse_json_object(line, path))
    if not lines or len(records) < len(lines):
        _log.warning("%s is missing or damaged; the model beside it is complete", path)
    return records
