"""Attack a patch set: the recipe, and the rows as they are computed."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from advdiff_cli.attacks.dispatch import AttackBatch, build_target, run_attack
from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.output_spec import Batch
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import LabelledBatch, PatchSet
from advdiff_cli.data.prefetch import prefetch
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.jobs.recipes import attack_recipe, differentiates_unet
from advdiff_cli.purification.defense import EvaluatedModel


@dataclass(frozen=True)
class AttackJob:
    """An attack on every patch of a set.

    Args:
        model: The attacked model.
        spec: The attack.
        patches: The rows, with labels, of one size.
        seed: Of every stream.
        batch_size: Patches computed together.
        device: Where to compute.
    """

    model: EvaluatedModel
    spec: AttackSpec
    patches: PatchSet
    seed: int
    batch_size: int
    device: torch.device

    @cached_property
    def recipe(self) -> Provenance:
        """The recipe of the attack."""
        compiled = self.model.compiled and differentiates_unet(self.model.spec, self.spec)
        return attack_recipe(
            self.model.spec, self.spec, self.patches, seed=self.seed, batch_size=self.batch_size, compiled=compiled
        )

    def run(self, writer: PatchWriter) -> Iterator[int]:
        """Attack the rows that `writer` does not have yet, yielding the number of rows after each batch."""
        purifier = None if self.model.defense is None else self.model.defense.purifier
        target = build_target(self.model.classifier, purifier, self.spec, self.model.precision)

        def read(batch: Batch) -> tuple[Batch, LabelledBatch]:
            return batch, self.patches.batch(batch.rows, self.device)

        with writer:
            for batch, rows in prefetch(read, writer.batches(self.batch_size)):
                attacked = AttackBatch(rows.images, rows.labels, rows.keys, rows.index, self.seed)
                writer.write(batch, run_attack(target, self.spec, attacked).cpu().numpy())
                yield batch.count
