"""Predict the class of every patch of a set by the vote over draws of a defense's noise, as a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.table_writer import Line, TableWriter
from advdiff_cli.evaluation.votes import Votes
from advdiff_cli.jobs.predict import predict_batches
from advdiff_cli.jobs.recipes import judging_batch_size, predict_recipe
from advdiff_cli.purification.defense import EvaluatedModel

HEADER = ("name", "decision", "p1", "share", "abstain")


@dataclass(frozen=True)
class PredictJob:
    """Predictions for every patch of a set, with or without labels.

    Args:
        model: The classifier, alone or behind a defense.
        patches: The rows, of one size.
        draws: Draws of the defense's noise; 1 for a classifier alone.
        alpha: A vote that is not decided at this level abstains.
        seed: Of the draws, which are those of `evaluate`.
        device: Where to compute.
    """

    model: EvaluatedModel
    patches: PatchSet
    draws: int
    alpha: float
    seed: int
    device: torch.device

    @property
    def batch_size(self) -> int:
        """Patches computed together: as in `evaluate`, so that its figures are those of these predictions."""
        return judging_batch_size(
            self.patches.require_shape(), defended=self.model.defense is not None, device=self.device.type
        )

    @cached_property
    def recipe(self) -> Provenance:
        """The recipe of the table."""
        return predict_recipe(self.model.spec, self.patches, draws=self.draws, alpha=self.alpha, seed=self.seed)

    def run(self, writer: TableWriter) -> Iterator[int]:
        """Predict the rows that `writer` does not have yet, yielding the number of rows after each batch."""
        batches, draws = list(writer.batches(self.batch_size)), range(self.draws)
        rows = [batch.rows for batch in batches]
        found = predict_batches(self.model.module, self.patches, rows, self.device, draws=draws, seed=self.seed)
        with writer:
            for batch, p1 in zip(batches, found, strict=True):
                names = [str(self.patches.keys[i]) for i in batch.rows]
                writer.write(batch, self._lines(names, Votes(p1)))
                yield batch.count

    def _lines(self, names: list[str], votes: Votes) -> list[Line]:
        voted = self.model.defense is not None  # a classifier alone always gives the same answer
        abstains = votes.abstains(self.alpha) if voted else np.zeros(len(votes.p1), bool)
        columns = (votes.decision, votes.mean, votes.share, abstains)
        return [
            (name, str(decision), f"{p1:.9g}", f"{share:.9g}", str(int(abstain)))
            for name, decision, p1, share, abstain in zip(names, *columns, strict=False)  # names of a padded batch
        ]
