"""Classifiers: modules from images in [0, 1] to logits, with the normalization inside.

A classifier folder holds config.json (architecture and normalization) and model.safetensors. Folders of timm, for an
architecture that torchvision has too, are read as well.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from advdiff_cli.data.atomic_files import name_write_errors
from advdiff_cli.data.provenance import KEY, Provenance, canonical_json
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.classifier_config import CONFIG, WEIGHTS, ClassifierConfig, read_classifier_config
from advdiff_cli.models.external import OWN_MODULE, TIATOOLBOX, PooledCNN, read_weights, tiatoolbox_backbone

PCAM_SIZE = (96, 96)
_MISSING = 10_000_000  # numbers that a file may lack for its first missing tensor to be named
_CUT_OFF = 150_000_000  # numbers of the head that TIAToolbox cuts off a network, at most


class Classifier(nn.Module):
    """A torchvision network that takes images in [0, 1] and returns logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        """Build the architecture with random weights.

        Raises:
            AdvdiffError: torchvision has no such architecture.
        """
        super().__init__()
        self.config = config
        self.backbone = _backbone(config.arch)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 2) of images (B, 3, H, W) in [0, 1]."""
        return self.classify(self.config.view.apply(images))

    def classify(self, images: Tensor) -> Tensor:
        """Return logits (B, 2) of what is read of patches (B, 3, H', W'), in [0, 1]."""
        logits: Tensor = self.backbone((images - self.mean) / self.std)
        scaled = logits * self.config.slope
        return torch.cat((scaled[:, :1], scaled[:, 1:] + self.config.bias), 1)  # no copy that a GPU would wait for


def _backbone(arch: str) -> nn.Module:
    from torchvision.models import get_model, list_models

    if arch.startswith(TIATOOLBOX):
        name = arch.removeprefix(TIATOOLBOX)
        return PooledCNN(_backbone(name), name)
    names = list_models(module=__import__("torchvision").models)
    if arch not in names:
        raise AdvdiffError(
            f"torchvision has no classification architecture {arch}; for example resnet18, googlenet, densenet121"
        )
    extra = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    network: nn.Module = get_model(arch, weights=None, num_classes=2, **extra)
    return network


def save_classifier(model: Classifier, folder: Path, provenance: Provenance) -> None:
    """Write config.json and model.safetensors, whose metadata holds the provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with name_write_errors(folder / WEIGHTS):
        save_file(state, folder / WEIGHTS, {"format": "pt", KEY: canonical_json(provenance)})


def read_classifier(folder: Path) -> Classifier:
    """Load a classifier folder, in eval mode, fp32.

    Raises:
        AdvdiffError: A file is missing or damaged, or the weights do not fit the architecture.
    """
    config, timm = read_classifier_config(folder)
    return _with_weights(
        config, read_weights(folder / WEIGHTS, allow_pickle=False), folder / WEIGHTS, prefix="backbone." if timm else ""
    )


def load_tiatoolbox(path: Path, *, allow_pickle: bool = False) -> Classifier:
    """Load TIAToolbox's weights for PCam as a classifier that returns logits, in eval mode, fp32.

    Args:
        path: BACKBONE-pcam.pth or .safetensors; the file name gives the backbone.
        allow_pickle: Whether a .pth file may be read.

    Raises:
        AdvdiffError: The name gives no backbone, the file may not or cannot be read, or it does not fit.
    """
    config = ClassifierConfig(TIATOOLBOX + tiatoolbox_backbone(path), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), size=PCAM_SIZE)
    state = read_weights(path, allow_pickle=allow_pickle)
    return _with_weights(config, state, path, prefix="backbone.", advice=f"; if it is another network, {OWN_MODULE}")


def _with_weights(
    config: ClassifierConfig, state: dict[str, Tensor], path: Path, prefix: str, advice: str = ""
) -> Classifier:
    numbers = sum(v.numel() for v in state.values())
    try:
        with _Allowance(numbers + (_CUT_OFF if config.arch.startswith(TIATOOLBOX) else _MISSING)):
            model = Classifier(config)
    except _LargerThanItsFile:
        raise AdvdiffError(
            f"{path} does not fit {config.arch}: the file holds {numbers} numbers, and the network has more{advice}"
        ) from None
    except AdvdiffError as e:
        raise AdvdiffError(f"{path.parent}: {e}") from None
    named = {prefix + k: v for k, v in state.items()}
    wanted = model.state_dict()
    if (problem := _misfit(wanted, named)) is not None:
        raise AdvdiffError(f"{path} does not fit {config.arch}: {problem}{advice}")
    wanted.update(named)  # which keeps the versions of its layers: MNASNet asks for its own
    model.load_state_dict(wanted)
    if not all(bool(v.isfinite().all()) for v in state.values()):
        raise AdvdiffError(f"{path} holds weights that are not finite; train the model again")
    return model.eval()


class _LargerThanItsFile(Exception):
    """A network has more parameters than its file of weights."""


class _Allowance(TorchFunctionMode):
    """Stops the construction of a network whose layers need more than so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._left = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.empty:  # which layers call for their parameters, before they are initialized
            self._left -= made.numel()
            if self._left < 0:
                raise _LargerThanItsFile
        return made


def _misfit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Return why weights are not those that are wanted, or None if they are."""
    shapes = [k for k in sorted(wanted.keys() & state.keys()) if wanted[k].shape != state[k].shape]
    counts = {k for k in wanted if k.endswith(".num_batches_tracked")}  # which eval mode does not read
    missing, unknown = sorted(wanted.keys() - state.keys() - counts), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        count = f"{len(missing)} of its {len(wanted)} tensors are missing, and {len(unknown)} others are there"
        return f"{count}, such as {(missing or unknown)[0].removeprefix('backbone.')}"
    if shapes:
        name = shapes[0]
        own, needed = (list(tensors[name].shape) for tensors in (state, wanted))
        return f"{name.removeprefix('backbone.')} has shape {own}, and {needed} is needed"
    return None
