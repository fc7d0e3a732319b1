"""The configuration of a classifier, config.json. It is read without loading torch."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from advdiff_cli.data.provenance import read_json_object
from advdiff_cli.data.view import View
from advdiff_cli.errors import AdvdiffError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ClassifierConfig:
    """The architecture, normalization and calibration of a classifier.

    Args:
        arch: A torchvision architecture, or `tiatoolbox:` and the backbone of a TIAToolbox architecture.
        mean: Of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        slope: Factor of the network's log-odds of class 1 (Platt 1999).
        bias: Added to them.
        crop: Side of the center crop that is read of a patch; None for all of it.
        pool: Side of the squares of pixels that are averaged.
        size: (H, W) of the patches that it was trained on, if known.
    """

    arch: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    slope: float = 1.0
    bias: float = 0.0
    crop: int | None = None
    pool: int = 1
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for invalid values, since a config may come from anywhere."""
        numbers = [*self.mean, *self.std, self.slope, self.bias]
        good = len(self.mean) == len(self.std) == 3 and all(type(n) in (int, float) and isfinite(n) for n in numbers)
        if not good or min(self.std) <= 0 or not isinstance(self.arch, str):
            raise ValueError(
                f"an architecture, three means, three standard deviations, a slope and a bias are needed: {self}"
            )
        if self.size is not None and [type(side) for side in self.size] != [int, int]:
            raise ValueError(f"size must be the height and width of a patch in pixels, not {self.size}")
        View(self.crop, self.pool)

    @property
    def view(self) -> View:
        """What the classifier reads of a patch."""
        return View(self.crop, self.pool)


def read_classifier_config(folder: Path) -> tuple[ClassifierConfig, bool]:
    """Return the configuration of a classifier folder, and whether the folder is timm's.

    Raises:
        AdvdiffError: A file is missing, or the configuration is invalid.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdvdiffError(f"{folder} is not a classifier folder: {name} is missing")
    try:
        raw = read_json_object(folder / CONFIG)
        timm = raw.get("pretrained_cfg")
        if timm is not None:
            size = list(timm.get("input_size", ()))[1:] or None
            raw = {"arch": raw["architecture"], "mean": timm["mean"], "std": timm["std"], "size": size}
        tuples = {k: tuple(raw[k]) for k in ("mean", "std", "size") if raw.get(k) is not None}
        return ClassifierConfig(**raw | tuples), timm is not None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise AdvdiffError(f"{folder / CONFIG} is not a classifier config ({e})") from None
