"""The attack in the code of Ankile et al. 2022: five steps of Adam, with learning rate 1e5, on the classifier alone.

With so large a learning rate, every step reaches the surface of the ball: sign steps with momentum. The attack starts
at the image, keeps no best iterate, and maximizes the cross-entropy of probabilities treated as logits (a double
softmax), as their code does with TIAToolbox's outputs. Only the result is clipped to [0, 1], not the iterates. The
attack is here to explain their figures; it is not a strong one.

Source: Ankile, Midgley, Weisshaar 2022, Adversarial_examples.ipynb, cell 10.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LEARNING_RATE = 1e5


def ankile2022(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 5) -> Tensor:
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
