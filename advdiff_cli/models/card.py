"""The card of a diffusion model, advdiff.json: what its weights expect, and the settings recommended for it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from advdiff_cli.data.provenance import Provenance, read_json_object
from advdiff_cli.data.view import View
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from torch import Tensor

CARD = "advdiff.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PICKLED_UNET = "unet/diffusion_pytorch_model.bin"

_MAX_TIMESTEPS = 100_000

SamplerName = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class PurificationSettings:
    """Noise level as a fraction of T, reverse process, and U-Net evaluations (None: one for each noise level).

    The defaults are those of Ankile et al. 2022.
    """

    t_star: float = 0.04
    sampler: SamplerName = "ddpm"
    sampler_steps: int | None = None


@dataclass(frozen=True)
class DdpmCard:
    """What advdiff.json records about a diffusion model.

    Args:
        space_to_depth: The U-Net works on images unshuffled by this factor.
        max_t: The highest noise level it was trained on, as a fraction of T.
        data_range: The range that pixels in [0, 1] are scaled to.
        index_offset: Noise levels between the level an image is noised to and the first level that is denoised: 0,
            but 1 in the paper's code.
        crop: Side of the center crops it was trained on; None for whole patches.
        pool: Side of the squares of pixels that were averaged before.
        recommended: Default settings for purification.
        certification: Default settings for certificates, where they differ.
        provenance: How the model was made.
    """

    space_to_depth: int = 1
    max_t: float = 1.0
    data_range: tuple[float, float] = (-1.0, 1.0)
    index_offset: int = 0
    crop: int | None = None
    pool: int = 1
    recommended: PurificationSettings = field(default_factory=PurificationSettings)
    certification: PurificationSettings | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for invalid values, since a card may come from anywhere."""
        settings = [self.recommended, *([self.certification] if self.certification else [])]
        steps = [1 if s.sampler_steps is None else s.sampler_steps for s in settings]
        low, high = self.data_range
        good = all(type(n) is int for n in (self.space_to_depth, self.index_offset, *steps))
        good &= 1 <= self.space_to_depth <= 32 and self.index_offset >= 0 and min(steps) >= 1
        good &= all(type(n) in (int, float) and 0 < n <= 1 for n in (self.max_t, *(s.t_star for s in settings)))
        good &= -1e3 < low < high < 1e3 and all(s.sampler in get_args(SamplerName) for s in settings)
        if not good or not isinstance(self.provenance, dict | None):
            raise ValueError("invalid space-to-depth factor, noise levels, data range or settings")
        View(self.crop, self.pool)

    @property
    def view(self) -> View:
        """What the model was trained on of each patch."""
        return View(self.crop, self.pool)

    def default_settings(self, *, certify: bool) -> PurificationSettings:
        """Return the settings of a purifier that nobody gave: those for certificates, or for everything else."""
        return self.certification if certify and self.certification else self.recommended

    def to_range(self, images: "Tensor") -> "Tensor":
        """Scale images from [0, 1] to the data range."""
        low, high = self.data_range
        return images * (high - low) + low

    def to_pixels(self, x_0: "Tensor") -> "Tensor":
        """Scale x_0 from the data range to [0, 1]."""
        low, high = self.data_range
        return (x_0 - low) / (high - low)


KNOWN_CARDS = {"ankile/ddpm-pcam-96-flip": DdpmCard(data_range=(0.0, 1.0), index_offset=1)}
"""Cards of Hub repositories without advdiff.json: the paper's model, which was trained on pixels in [0, 1]."""


def save_card(card: DdpmCard, folder: Path) -> None:
    """Write advdiff.json."""
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")


def load_card(folder: Path) -> DdpmCard:
    """Read advdiff.json; a folder without it gets the defaults: data in [-1, 1] and the paper's settings."""
    path = folder / CARD
    if not path.is_file():
        cached = {f"models--{name.replace('/', '--')}": card for name, card in KNOWN_CARDS.items()}
        return next((cached[part] for part in folder.parts if part in cached), DdpmCard())
    try:
        raw = read_json_object(path)
        recommended = PurificationSettings(**raw.pop("recommended", {}))
        for_proofs = raw.pop("certification", None)
        certification = PurificationSettings(**for_proofs) if for_proofs else None
        low, high = raw.pop("data_range", (-1.0, 1.0))
        pixels = (float(low), float(high))
        return DdpmCard(**raw, data_range=pixels, recommended=recommended, certification=certification)
    except (ValueError, TypeError, AttributeError) as e:
        raise AdvdiffError(f"{path} is not the advdiff.json of a diffusion model ({e})") from None


def read_timesteps(folder: Path) -> int:
    """Return T, the number of noise levels of the schedule in a diffusion model folder.

    Raises:
        AdvdiffError: There is no schedule, or its number of levels is not reasonable.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise AdvdiffError(f"{folder} is not a diffusion model folder: {path.name} is missing")
    levels = read_json_object(path).get("num_train_timesteps", 1000)
    if type(levels) is not int or not 1 <= levels <= _MAX_TIMESTEPS:
        raise AdvdiffError(f"{path}: num_train_timesteps is {str(levels)[:40]}; 1 to {_MAX_TIMESTEPS} is needed")
    return levels
