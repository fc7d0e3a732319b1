"""Platt scaling: a slope and a bias that calibrate a classifier's log-odds on validation rows.

Source: Platt 1999, Probabilistic outputs for support vector machines. Its smoothed targets keep the slope finite when
the classes are perfectly separated.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def fit_platt(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the slope and bias of the log-odds that maximize the likelihood of the labels.

    Args:
        logits: (N, 2).
        labels: (N,) 0 or 1.

    Returns:
        (slope, bias); (1, 0), which changes nothing, if a class is missing or the slope would not be positive.
    """
    odds = (logits[:, 1] - logits[:, 0]).double()
    positive, negative = int(labels.sum()), int((1 - labels).sum())
    if not positive or not negative:
        return 1.0, 0.0
    truth = torch.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2)).double()
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(odds * line[0] + line[1], truth)
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch leaves LBFGS.step untyped
    slope, bias = line.detach().tolist()
    return (round(slope, 6), round(bias, 6)) if slope > 0 else (1.0, 0.0)
