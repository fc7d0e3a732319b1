"""FAB, the minimal-norm attack, from pyautoattack (the extra `advdiff[autoattack]`), on deterministic models only.

Source: Croce & Hein 2020, arXiv:1907.02044. Its traps, closed here: it reseeds torch's global stream, judges a patch on
one draw, and what it does with a patch may depend on its batch, so it runs on one patch at a time.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.eot import check_images
from advdiff_cli.attacks.projections import Norm, project
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defended_classifier import DefendedClassifier, FixedNoise


def fab_installed() -> bool:
    """Tell whether pyautoattack is there."""
    return find_spec("pyautoattack") is not None


def fab(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 100, norm: Norm = "linf"
) -> Tensor:
    """Return adversarial images of the smallest norm where FAB finds one within eps, and the images elsewhere.

    Args:
        model: Deterministic, images in [0, 1] to logits; of a `FixedNoise` each patch meets its own noise.
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64.
        eps: Radius of the ball in [0, 1] pixels.
        steps: Iterations.
        norm: `linf` or `l2`.

    Raises:
        AdvdiffError: pyautoattack is not installed.
        ValueError: the model is randomised, or the images leave [0, 1].
    """
    if not fab_installed():
        raise AdvdiffError("--method fab needs pyautoattack: pip install 'advdiff[autoattack]'")
    if isinstance(model, DefendedClassifier):
        raise ValueError("FAB is for deterministic models; fix the noise first")
    from pyautoattack.fab_pt import FABAttack_PT

    check_images(images)
    found = []
    for i in range(len(images)):
        one = model.defended.fixed(model.frozen[i : i + 1]) if isinstance(model, FixedNoise) else model
        peer = FABAttack_PT(
            one, norm={"linf": "Linf", "l2": "L2"}[norm], n_restarts=1, n_iter=steps, eps=eps, device=images.device
        )
        with torch.random.fork_rng():
            found.append(peer.perturb(images[i : i + 1], labels[i : i + 1]).detach())
    return project(torch.cat(found), images, eps, norm)
