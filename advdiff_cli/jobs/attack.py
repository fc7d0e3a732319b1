"""Attack a patch set: the recipe, and the rows as they are computed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.attacks.dispatch import AttackBatch, build_target, run_attack
from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.prefetch import prefetch
from advdiff_cli.data.provenance import JsonObject, Provenance, canonical_json, digest
from advdiff_cli.data.selection import row_batches
from advdiff_cli.jobs.recipes import attack_recipe, differentiates_unet
from advdiff_cli.models.device import to_device
from advdiff_cli.purification.defense import EvaluatedModel


@dataclass(frozen=True)
class Examples:
    """The adversarial examples of an earlier attack.

    Args:
        patches: The examples, of the rows of the attacked set from position `first` on.
        first: See `patches`.
        kept: (N,) which rows of the attacked set are not attacked again, since they are broken.
    """

    patches: PatchSet
    first: int
    kept: NDArray[np.bool_]

    def read(self, rows: Rows) -> Tensor:
        """Return the examples (B, 3, H, W) of rows of the attacked set."""
        return self.patches.read(rows - self.first)


@dataclass(frozen=True)
class EarlierAttack:
    """An attack that another one goes on from: some rows keep its examples, and are not attacked again.

    Args:
        recipe: What made and judged the examples.
        is_start: Whether the other rows are attacked from its examples, and not from a point of their own.
        load: Returns the examples.
    """

    recipe: Provenance
    is_start: bool
    load: Callable[[], Examples]

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        return {"after": digest([canonical_json(self.recipe).encode()]), "starts_there": self.is_start}


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
        earlier: An attack that this one goes on from, if any.
    """

    model: EvaluatedModel
    spec: AttackSpec
    patches: PatchSet
    seed: int
    batch_size: int
    device: torch.device
    earlier: EarlierAttack | None = None

    @cached_property
    def recipe(self) -> Provenance:
        """The recipe of the attack."""
        compiled = self.model.compiled and differentiates_unet(self.model.spec, self.spec)
        return attack_recipe(
            self.model.spec,
            self.spec,
            self.patches,
            seed=self.seed,
            batch_size=self.batch_size,
            compiled=compiled,
            earlier=None if self.earlier is None else self.earlier.parameters(),
        )

    def run(self, writer: PatchWriter) -> Iterator[int]:
        """Attack the rows that `writer` does not have yet, yielding the number of rows after each batch."""
        with writer:
            if self.earlier is None:
                batches = list(writer.batches(self.batch_size))
                for batch, images in zip(batches, self._attack([b.rows for b in batches]), strict=True):
                    writer.write(batch, images)
                    yield batch.count
            else:
                yield from self._go_on(self.earlier.load(), writer)

    def _go_on(self, earlier: Examples, writer: PatchWriter) -> Iterator[int]:
        """Attack the rows that do not keep the examples of an earlier attack, in full batches, and write all."""
        batches, kept = list(writer.batches(self.batch_size)), earlier.kept
        left = np.array([i for b in batches for i in b.rows[: b.count] if not kept[i]], np.int64)
        packs = [left[pack] for pack in row_batches(len(left), self.batch_size, pad=True)]
        attacked = zip(packs, self._attack(packs, earlier), strict=True)
        found: dict[int, NDArray[np.float32]] = {}
        for batch in batches:
            rows = batch.rows.tolist()
            while not all(kept[i] or i in found for i in rows):
                pack, images = next(attacked)
                found.update(zip(pack.tolist(), images, strict=True))
            examples = earlier.read(batch.rows).numpy()
            writer.write(batch, np.stack([found.get(i, one) for i, one in zip(rows, examples, strict=True)]))
            for i in set(rows):
                found.pop(i, None)
            yield batch.count

    def _attack(self, batches: Sequence[Rows], earlier: Examples | None = None) -> Iterator[NDArray[np.float32]]:
        """Yield the attacked images (B, 3, H, W) of each full batch."""
        purifier = None if self.model.defense is None else self.model.defense.purifier
        target = build_target(self.model.classifier, purifier, self.spec, self.model.precision)
        start = earlier if self.earlier and self.earlier.is_start else None

        def read(rows: Rows) -> AttackBatch:
            b = self.patches.batch(rows, self.device)
            x = None if start is None else to_device(start.read(rows), self.device)
            return AttackBatch(b.images, b.labels, b.keys, b.index, self.seed, x)

        for batch in prefetch(read, batches):
            yield run_attack(target, self.spec, batch).cpu().numpy()
