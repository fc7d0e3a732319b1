"""The losses that attacks maximize, one value for each patch. Unlike AutoAttack's DLR, they work for two classes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from advdiff_cli.attacks.spec import LossName


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy (B,) of logits (B, classes)."""
    return cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the true one (B,); positive is misclassified (Carlini & Wagner 2017)."""
    true = one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(1) - logits.masked_fill(~true, -torch.inf).amax(1)


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {"ce": ce, "margin": margin}
