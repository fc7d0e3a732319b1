"""The accuracy of a classifier in training on validation rows."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.selection import row_batches
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.training.adversarial import TrainingInput

JUDGING_DRAWS = 4
"""Draws of the noise that must all be right for a validation row to count as consistent."""


@dataclass(frozen=True)
class Validation:
    """Evaluates a classifier on validation rows, which are purified and attacked as in training."""

    model: Classifier
    rows: PatchSet
    batch_size: int
    inputs: TrainingInput
    device: torch.device

    def logits(self, *, attacked: bool = False, draw: int = 0) -> tuple[Tensor, Tensor]:
        """Return logits (N, 2), under a draw of the noise, and labels (N,)."""
        self.model.eval()
        batches = row_batches(len(self.rows), self.batch_size)
        logits = torch.cat([self._batch(rows, attacked, draw) for rows in batches])
        return logits, torch.from_numpy(self.rows.require_labels())

    def _batch(self, rows: Rows, attacked: bool, draw: int) -> Tensor:
        names = [f"valid {i}" for i in rows]
        batch = self.rows.batch(rows, self.device)
        images = channels_last(batch.images)
        if attacked:
            images = self.inputs.perturb(self.model, images, batch.labels, names)
        with torch.inference_mode():
            logits: Tensor = self.model(channels_last(self.inputs.purify(images, names, draw)))
        return logits.float().cpu()

    def judge(self) -> tuple[float, dict[str, Tensor]]:
        """Return the loss, and which rows (N,) are right, by the name of the accuracy; the last one chooses the epoch.

        The first is that under one draw of the noise, as is the loss. The accuracy on attacked rows is added if
        training has an adversary, and that under each of `JUDGING_DRAWS` draws if it has consistency regularization.
        """
        logits, labels = self.logits()
        found = {"valid_accuracy": _right(logits, labels)}
        if self.inputs.adversary is not None:
            found["valid_robust_accuracy"] = _right(*self.logits(attacked=True))
        if self.inputs.consistency:
            others = [_right(*self.logits(draw=draw)) for draw in range(1, JUDGING_DRAWS)]
            found["valid_consistent_accuracy"] = torch.stack([found["valid_accuracy"], *others]).all(0)
        return cross_entropy(logits, labels).item(), found


def channels_last(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) with the channels of a pixel together in memory, as in the trained networks."""
    return images.contiguous(memory_format=torch.channels_last)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) == labels
