"""Classifiers made elsewhere: TIAToolbox's weights, and any torch module that a callable returns.

TIAToolbox's CNNModel (tiatoolbox.models.architecture.vanilla) is a torchvision network cut before its pooling, followed
by global average pooling and one linear layer. It returns a softmax, which is left out here. Its preprocessing for PCam
is ToTensor: pixels in [0, 1], without normalization.
"""

import importlib
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from advdiff_cli.data.provenance import digest, file_digest
from advdiff_cli.errors import AdvdiffError, first_line, is_debugging

TIATOOLBOX = "tiatoolbox:"
"""Prefix of TIAToolbox's architectures, followed by the name of the backbone in torchvision."""

OWN_MODULE = "write a function that builds it, and give -c module:function (five lines: docs/guide.md, Models)"
"""Advice on weights that no other form loads."""

_HEAD_CHILDREN = {"googlenet": 3, "inception_v3": 3}  # pooling, dropout and linear layer; others have no dropout
_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = {"site-packages", "dist-packages"}
_TEST_COLORS = [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.7, 0.5, 0.7), (0.4, 0.2, 0.6), (0.9, 0.7, 0.8), (0.5, 0.5, 0.5)]


class PooledCNN(nn.Module):
    """TIAToolbox's CNNModel with two classes and the same parameter names, returning logits."""

    def __init__(self, network: nn.Module, backbone: str) -> None:
        """Cut a torchvision network with random weights before its pooling."""
        super().__init__()
        features = getattr(network, "features", None)
        head = _HEAD_CHILDREN.get(backbone, 2)
        self.feat_extract: nn.Module = features or nn.Sequential(*list(network.children())[:-head])
        with torch.no_grad():
            channels = self.feat_extract.eval()(torch.zeros(1, 3, 96, 96)).shape[1]
        self.classifier = nn.Linear(channels, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 2)."""
        logits: Tensor = self.classifier(self.feat_extract(images).mean((2, 3)))
        return logits


class TwoLogits(nn.Module):
    """A module with one or two logits for each patch, as a module with two."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a module that takes images (B, 3, H, W) in [0, 1]."""
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
    """Return the tensors of a .safetensors file, or of a pickled file if that is allowed.

    Raises:
        AdvdiffError: The file is pickled and that is not allowed, is damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as e:
            raise AdvdiffError(f"{path} is not a complete safetensors file ({e}); make or download it again") from None
    if not allow_pickle:
        raise AdvdiffError(f"{path} holds pickled weights; give --allow-pickle if you trust its source")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise AdvdiffError(f"{path} is not a file of weights only ({str(e).partition('.')[0]})") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise AdvdiffError(f"{path} does not map names to weights; save a module's state_dict()")
    return dict(state)


def tiatoolbox_backbone(path: Path) -> str:
    """Return the backbone that a file of TIAToolbox is named after: resnet101 for resnet101-pcam.pth.

    Raises:
        AdvdiffError: The name has another form.
    """
    found = re.match(r"(.+)-pcam\b", path.name)
    if found is None:
        raise AdvdiffError(
            f"{path} is not named as TIAToolbox's weights for PCam are, such as resnet101-pcam.pth, which gives the "
            f"backbone; for another network, {OWN_MODULE}"
        )
    return found[1]


def load_callable(name: str) -> tuple[nn.Module, str]:
    """Return the module that module:callable returns, with two logits, in eval mode, and its answers on test patches.

    Modules in the working directory are found, as by `python -m`. The answers are part of what identifies the module:
    they also depend on what it keeps outside its parameters and buffers, such as files that it reads.

    Raises:
        AdvdiffError: There is no such callable, or it does not return a module with one or two logits.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as e:
        missing = e.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise AdvdiffError(f"{name}: there is no module {missing} here or among the installed packages") from None
        raise AdvdiffError(f"{name}: {_own_line(e)}") from None
    except Exception as e:  # of the user's own code
        if is_debugging():
            raise
        raise AdvdiffError(f"{name}: {_own_line(e)}") from None
    if not callable(found):
        raise AdvdiffError(f"{name} is {type(found).__name__}, not a callable that returns a torch module")
    try:
        made = found()
    except Exception as e:  # of the user's own code
        if is_debugging():
            raise
        raise AdvdiffError(f"{name}: {_own_line(e)}") from None
    if not isinstance(made, nn.Module):
        raise AdvdiffError(f"{name} returned {type(made).__name__}, not a torch module")
    made = made.cpu().eval()
    answers = _check_logits(name, made)
    return TwoLogits(made).eval(), _rounded(answers)


def _own_line(problem: Exception) -> str:
    """Return an exception with the last file and line of the user's code that it passed."""
    calls = traceback.extract_tb(problem.__traceback__)
    own = [c for c in calls if _PACKAGE not in Path(c.filename).parents and Path(c.filename).is_file()]
    own = [c for c in own if not _INSTALLED & set(Path(c.filename).parts) and "importlib" not in c.filename] or own
    if isinstance(problem, SyntaxError) and problem.filename:
        return f"{problem.filename}, line {problem.lineno}: {type(problem).__name__}: {problem.msg}"
    where = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    return f"{where}{type(problem).__name__}: {problem}"


def source_digest(name: str) -> str:
    """Return the SHA-256 of the source files behind an imported module:callable.

    They are the file of the module, and the imported files of its package, or of its folder if it has no package.
    advdiff's own files are left out. A module without a file has the hash of nothing.
    """
    module_name = name.partition(":")[0]
    found, top = importlib.util.find_spec(module_name), importlib.util.find_spec(module_name.partition(".")[0])
    if found is None or top is None or not found.origin or not Path(found.origin).is_file():
        return digest([])
    own, home = Path(found.origin).resolve(), Path(top.origin or found.origin).resolve().parent
    single_file = home.name in _INSTALLED  # its folder holds every installed package
    loaded = (Path(f).resolve() for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None)))
    below = {p for p in loaded if home in p.parents and _PACKAGE not in p.parents}
    related = {p for p in below if not single_file and not _INSTALLED & {*p.relative_to(home).parts}}
    return digest(file_digest(p).encode() for p in sorted({own, *filter(Path.is_file, related)}))


def _rounded(answers: Tensor) -> str:
    """Return logits as whole numbers of 1/256 of their size, so that processors which round differently agree."""
    _, exponent = math.frexp(float(answers.abs().max()))
    return f"{exponent} {answers.double().div(2.0 ** (exponent - 8)).round().long().flatten().tolist()}"


@torch.no_grad()
def _check_logits(name: str, module: nn.Module) -> Tensor:
    """Return the one or two finite logits of a module, not probabilities, on plain and noisy patches (B, 3, 96, 96)."""
    plain = torch.tensor(_TEST_COLORS).view(-1, 3, 1, 1).expand(-1, -1, 96, 96)
    noisy = torch.rand(plain.shape, generator=torch.Generator().manual_seed(0))
    images = torch.cat([plain, noisy])
    try:
        found, again = module(images), module(images)
    except (RuntimeError, ValueError, AssertionError, TypeError) as e:
        raise AdvdiffError(f"{name} does not take patches (B, 3, 96, 96) ({first_line(e)})") from None
    shape = list(found.shape) if isinstance(found, Tensor) else [type(found).__name__]
    if shape not in ([len(images)], [len(images), 1], [len(images), 2]):
        raise AdvdiffError(f"{name} returns {shape} for {len(images)} patches; one or two logits each are needed")
    if not found.isfinite().all():
        raise AdvdiffError(f"{name} returns values that are not finite")
    if not torch.allclose(found, again, rtol=1e-3, atol=1e-3):
        raise AdvdiffError(
            f"{name} returns different values for the same patches; only a defense of advdiff may be random, since its "
            "noise is known to attacks: make the module deterministic, and give --defense"
        )
    sums = found.reshape(len(images), -1).sum(1)
    if bool(((found >= 0) & (found <= 1)).all()) and (shape[-1] != 2 or bool((sums - 1).abs().max() < 1e-3)):
        raise AdvdiffError(f"{name} seems to return probabilities, all in [0, 1]; return logits, before the softmax")
    answers: Tensor = found
    return answers
