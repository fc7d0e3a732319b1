"""What an attack achieved, judged on what was stored."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from advdiff_cli.attacks.balls import Norm, round_inside, surface_share
from advdiff_cli.data.patches import PatchSet

BATCH = 64


@dataclass
class Achieved:
    """Right answers (N,) on clean, attacked and attacked-then-rounded images, and the share on the ball's surface."""

    clean: list[bool] = field(default_factory=list)
    attacked: list[bool] = field(default_factory=list)
    rounded: list[bool] = field(default_factory=list)
    on_surface: float = 0.0
    perturbed: float = 0.0

    @property
    def flipped(self) -> int:
        """How many patches were right before and wrong after."""
        return sum(before and not after for before, after in zip(self.clean, self.attacked, strict=True))

    @property
    def surface(self) -> float:
        """The share of perturbed values (l-inf) or patches (l2) on the ball's surface."""
        return self.on_surface / self.perturbed if self.perturbed else 0.0


@torch.inference_mode()
def judge(
    model: nn.Module, clean: PatchSet, adv: PatchSet, first: int, eps: float, norm: Norm, device: torch.device
) -> Achieved:
    """Judge the stored rows of `adv`, which were made from the rows of `clean` from position `first` on, in fp32."""
    labels = clean.require_labels()
    result = Achieved()
    for start in range(0, len(adv), BATCH):
        rows = np.arange(start, min(start + BATCH, len(adv)))
        images, points = clean.read(rows + first).to(device), adv.read(rows).to(device)
        truth = torch.from_numpy(labels[rows + first]).to(device)
        for kind, batch in (
            ("clean", images),
            ("attacked", points),
            ("rounded", round_inside(points, images, eps, norm)),
        ):
            getattr(result, kind).extend((model(batch).argmax(1) == truth).tolist())
        on_surface, perturbed = surface_share(points, images, eps, norm)
        result.on_surface += on_surface
        result.perturbed += perturbed
    return result
