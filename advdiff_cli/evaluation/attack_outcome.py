"""What an attack achieved, judged on what was stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from advdiff_cli.attacks.projections import Norm, round_inside, surface_share
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.rng import RowKey
from advdiff_cli.purification.defended_classifier import DefendedClassifier, finite, judged_at_once

DRAWS = 3  # of a defence's noise: the first ones that evaluate takes


@dataclass
class Achieved:
    """The share of draws (N,) right on clean, attacked and attacked-then-rounded images, and of points on the surface.

    A deterministic model has one draw.
    """

    clean: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    rounded: list[float] = field(default_factory=list)
    draws: int = 1
    on_surface: float = 0.0
    perturbed: float = 0.0

    @property
    def flipped(self) -> int:
        """How many patches were right in most draws before, and wrong in most after."""
        return sum(before > 0.5 > after for before, after in zip(self.clean, self.attacked, strict=True))

    @property
    def surface(self) -> float:
        """The share of perturbed values (l-inf) or patches (l2) on the ball's surface."""
        return self.on_surface / self.perturbed if self.perturbed else 0.0


@torch.inference_mode()
def judge(
    model: nn.Module, clean: PatchSet, adv: PatchSet, first: int, eps: float, norm: Norm, device: torch.device,
    seed: int = 0, draws: int = DRAWS, advance: Callable[[int], None] = lambda count: None,
) -> Achieved:  # fmt: skip
    """Judge the stored rows of `adv`, which were made from the rows of `clean` from position `first` on.

    A defended classifier is judged over the first `draws` evaluation draws of `seed`. `advance` is called with the
    number of rows done.
    """
    result = Achieved(draws=draws if isinstance(model, DefendedClassifier) else 1)
    size = judged_at_once(model)
    for start in range(0, len(adv), size):
        rows = np.arange(start, min(start + size, len(adv)))
        images, points = clean.read(rows + first).to(device), adv.read(rows).to(device)
        truth = torch.from_numpy(clean.require_labels()[rows + first]).to(device)
        keys = clean.index[rows + first].tolist()
        for kind, batch in (
            ("clean", images),
            ("attacked", points),
            ("rounded", round_inside(points, images, eps, norm)),
        ):
            logits = [finite(z, keys, adv.path) for z in _drawn(model, batch, keys, seed, draws)]
            right = torch.stack([(z.argmax(1) == truth).cpu() for z in logits]).double().mean(0)
            getattr(result, kind).extend(right.tolist())
        on_surface, perturbed = surface_share(points, images, eps, norm)
        result.on_surface += on_surface
        result.perturbed += perturbed
        advance(len(rows))
    return result


def _drawn(model: nn.Module, images: Tensor, rows: list[RowKey], seed: int, draws: int) -> Iterator[Tensor]:
    """Yield the logits (B, classes) under each draw that judges; under the one there is, of a deterministic model."""
    if not isinstance(model, DefendedClassifier):
        yield model(images)
        return
    for draw in range(draws):
        yield model(images, model.noise(images, rows=rows, seed=seed, purpose="evaluate", draw=draw))
