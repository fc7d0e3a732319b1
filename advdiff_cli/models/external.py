"""Classifiers made elsewhere: TIAToolbox's weights, timm's folders, and any torch module a callable returns.

TIAToolbox's CNNModel (tiatoolbox.models.architecture.vanilla) is a torchvision network cut before its pooling, then
global average pooling and one linear layer; it returns softmax, and is built here without. Its preprocessing for PCam
is ToTensor alone: pixels in [0, 1], no normalisation.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from advdiff_cli.data.provenance import digest, file_digest
from advdiff_cli.errors import AdvdiffError

TIATOOLBOX = "tiatoolbox:"
"""Prefix of an architecture that is TIAToolbox's, before the name of its backbone in torchvision."""

_CUT = {"googlenet": 3, "inception_v3": 3}  # children from the pooling on: also a dropout
_OURS = Path(__file__).resolve().parents[1]
_INSTALLED = {"site-packages", "dist-packages"}
_HUES = [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.7, 0.5, 0.7), (0.4, 0.2, 0.6), (0.9, 0.7, 0.8), (0.5, 0.5, 0.5)]


class PooledCNN(nn.Module):
    """TIAToolbox's CNNModel with two classes, its parameters named alike, to the logits."""

    def __init__(self, network: nn.Module, backbone: str) -> None:
        """Cut a torchvision network of random weights."""
        super().__init__()
        features = getattr(network, "features", None)
        self.feat_extract: nn.Module = features or nn.Sequential(*list(network.children())[: -_CUT.get(backbone, 2)])
        with torch.no_grad():
            channels = self.feat_extract.eval()(torch.zeros(1, 3, 96, 96)).shape[1]
        self.classifier = nn.Linear(channels, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 2)."""
        logits: Tensor = self.classifier(self.feat_extract(images).mean((2, 3)))
        return logits


class TwoLogits(nn.Module):
    """A module that returns one or two logits a patch, as one that returns two."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a module from images (B, 3, H, W) in [0, 1]."""
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 2); a single logit is that of class 1."""
        logits: Tensor = self.module(images)
        if logits.ndim == 2 and logits.shape[1] == 2:
            return logits
        one = logits.reshape(len(images))
        return torch.stack([torch.zeros_like(one), one], 1)


def read_weights(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a pickled one where that is allowed.

    Raises:
        AdvdiffError: pickled and not allowed, not whole, or holding more than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as e:
            raise AdvdiffError(f"{path} is not a whole safetensors file ({e}); make or fetch it again") from None
    if not allow_pickle:
        raise AdvdiffError(f"{path} holds pickled weights; give --allow-pickle if you trust where it came from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise AdvdiffError(f"{path} is no file of weights alone ({str(e).splitlines()[0]})") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise AdvdiffError(f"{path} holds no weights by name; save a module's state_dict()")
    return dict(state)


def tiatoolbox_backbone(path: Path) -> str:
    """Return the backbone that TIAToolbox's name of a file says, resnet101 for resnet101-pcam.pth."""
    found = re.match(r"(.+)-pcam\b", path.name)
    if found is None:
        raise AdvdiffError(
            f"{path} does not say what it is: call it as TIAToolbox does, for example resnet101-pcam.pth, "
            "or give a classifier folder"
        )
    return found[1]


def from_callable(name: str) -> nn.Module:
    """Return what the callable named module:callable returns, as a module to two logits, in eval mode.

    Modules of the working directory are found, as `python -m` finds them.

    Raises:
        AdvdiffError: there is no such callable, or what it returns is no module to one or two logits.
    """
    where, _, what = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(where), what)()
    except (ImportError, AttributeError, TypeError) as e:
        raise AdvdiffError(f"{name} is no callable without arguments in a module that can be imported ({e})") from None
    if not isinstance(made, nn.Module):
        raise AdvdiffError(f"{name} returned {type(made).__name__}, not a torch module")
    _check_logits(name, made.eval())
    return TwoLogits(made).eval()


def source_digest(name: str) -> str:
    """Return the SHA-256 of the sources that module:callable, once imported, is made of; of nothing without any.

    They are the module's own and those that were imported from its package, or from beside it where it has none;
    advdiff's own are not among them.
    """
    where = name.partition(":")[0]
    found, top = importlib.util.find_spec(where), importlib.util.find_spec(where.partition(".")[0])
    if found is None or top is None or not found.origin or not Path(found.origin).is_file():
        return digest([])
    own, home = Path(found.origin).resolve(), Path(top.origin or found.origin).resolve().parent
    alone = home.name in _INSTALLED  # one file among all that is installed
    loaded = (Path(f).resolve() for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None)))
    theirs = {p for p in loaded if home in p.parents and _OURS not in p.parents}
    beside = {p for p in theirs if not alone and not _INSTALLED & {*p.relative_to(home).parts}}
    return digest(file_digest(p).encode() for p in sorted({own, *filter(Path.is_file, beside)}))


@torch.no_grad()
def _check_logits(name: str, module: nn.Module) -> None:
    """Check on plain and noisy patches that `module` returns one or two finite logits each, not probabilities."""
    plain = torch.tensor(_HUES).view(-1, 3, 1, 1).expand(-1, -1, 96, 96)
    noisy = torch.rand(plain.shape, generator=torch.Generator().manual_seed(0))
    images = torch.cat([plain, noisy])
    try:
        found: Any = module(images)
        again: Any = module(images)
    except (RuntimeError, ValueError, AssertionError, TypeError) as e:
        raise AdvdiffError(f"{name} does not take patches (B, 3, 96, 96) ({str(e).splitlines()[0]})") from None
    shape = list(found.shape) if isinstance(found, Tensor) else [type(found).__name__]
    if shape not in ([len(images)], [len(images), 1], [len(images), 2]):
        raise AdvdiffError(f"{name} returns {shape} for {len(images)} patches; one or two logits each are needed")
    if not found.isfinite().all():
        raise AdvdiffError(f"{name} returns values that are not finite")
    if not torch.allclose(found, again, rtol=1e-3, atol=1e-3):
        raise AdvdiffError(
            f"{name} returns other values for the same patches: a random model is attacked and judged fairly only "
            "where its noise is known; freeze it, or let --defense be what is random"
        )
    sums = found.reshape(len(images), -1).sum(1)
    if bool(((found >= 0) & (found <= 1)).all()) and (shape[-1] != 2 or bool((sums - 1).abs().max() < 1e-3)):
        raise AdvdiffError(
            f"{name} returns probabilities, it seems: all lie in [0, 1]; return logits, before the softmax"
        )
