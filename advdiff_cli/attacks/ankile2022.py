"""The attack of the paper's code: five steps of Adam at a learning rate of 1e5 on the classifier alone.

So large a rate makes every step reach the ball's surface: signs, with momentum. It starts at the image, keeps no best
iterate, and climbs the cross-entropy of probabilities taken for logits (a double softmax), as the code does with
TIAToolbox's outputs. Nothing keeps its iterates in [0, 1]; only the result is clipped, for images hold no more.
Source: Ankile, Midgley, Weisshaar 2022, Adversarial_examples.ipynb, cell 10; it is here so that their figures can be
explained, not as a good attack.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LEARNING_RATE = 1e5


def paper(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 5) -> Tensor:
    """Return adversarial images (B, 3, H, W) in the l-inf ball and in [0, 1].

    Args:
        model: Images in [0, 1] to logits (B, classes), in eval mode, parameters frozen.
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64.
        eps: Radius of the ball in [0, 1] pixels.
        steps: Steps of Adam.
    """
    delta = torch.zeros_like(images, requires_grad=True)
    adam = torch.optim.Adam([delta], LEARNING_RATE, maximize=True)
    for _ in range(steps):
        with torch.enable_grad():
            loss = cross_entropy(model(images + delta).softmax(1), labels, reduction="sum")
        (delta.grad,) = torch.autograd.grad(loss, delta)
        adam.step()
        with torch.no_grad():
            delta.clamp_(-eps, eps)
    return (images + delta.detach()).clamp(0, 1)
