"""FAB, a minimum-norm attack for deterministic models, from pyautoattack (the extra `advdiff[autoattack]`).

Source: Croce & Hein 2020, arXiv:1907.02044. The implementation seeds torch's global generator, and its result for a
patch may depend on the other patches of the batch. Here the generator is restored and patches are attacked one by one.
"""

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.eot import check_images
from advdiff_cli.attacks.projections import project
from advdiff_cli.attacks.spec import Norm, fab_is_installed
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defended_classifier import DefendedClassifier, FixedNoiseClassifier


def fab(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 100, norm: Norm = "linf"
) -> Tensor:
    """Return the smallest perturbation that FAB finds within eps for each image, or the image itself.

    Args:
        model: Deterministic, images in [0, 1] to logits; a `FixedNoiseClassifier` uses each patch's own noise.
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64.
        eps: Radius of the ball in [0, 1] pixels.
        steps: Iterations.
        norm: `linf` or `l2`.

    Raises:
        AdvdiffError: pyautoattack is not installed.
        ValueError: The model is random, or the images leave [0, 1].
    """
    if not fab_is_installed():
        raise AdvdiffError("--method fab needs pyautoattack: pip install pyautoattack")
    if isinstance(model, DefendedClassifier):
        raise ValueError("FAB is for deterministic models; fix the noise first")
    from pyautoattack.fab_pt import FABAttack_PT

    check_images(images)
    found = []
    for i in range(len(images)):
        one: nn.Module = model
        if isinstance(model, FixedNoiseClassifier):
            one = model.defended.fixed(model.frozen[i : i + 1] if len(model.frozen) > 1 else model.frozen)
        attack = FABAttack_PT(
            one, norm={"linf": "Linf", "l2": "L2"}[norm], n_restarts=1, n_iter=steps, eps=eps, device=images.device
        )
        with torch.random.fork_rng():
            found.append(attack.perturb(images[i : i + 1], labels[i : i + 1]).detach())
    return project(torch.cat(found), images, eps, norm)
