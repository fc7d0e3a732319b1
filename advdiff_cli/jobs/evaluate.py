"""Evaluate a model on a patch set, and tell what a table of certificates proves of it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from advdiff_cli.certification.certificate_file import certificate_provenance, read_certificates
from advdiff_cli.certification.summary import summarize, told_sizes
from advdiff_cli.data.distributed import NO_SHARD_UNDER_TORCHRUN, ProcessGroup
from advdiff_cli.data.output_spec import OutputSpec, RowRange, shard_rows
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject, Provenance, history, provenance, recipe
from advdiff_cli.data.recorded_files import check_replaceable, record_of, recorded_write
from advdiff_cli.data.resume import identity, part_of
from advdiff_cli.data.row_fingerprints import shared_rows
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.predictions_csv import read_predictions, write_predictions
from advdiff_cli.jobs.predict import ALONE, predict
from advdiff_cli.jobs.recipes import judging_batch_size
from advdiff_cli.jobs.sharding import Shard
from advdiff_cli.purification.defense import EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec, ModelSpec

_log = logging.getLogger(__name__)


def evaluate_set(
    name: str,
    patches: PatchSet,
    model: EvaluatedModel,
    device: torch.device,
    *,
    draws: range,
    seed: int,
    advance: Callable[[int], None],
    group: ProcessGroup = ALONE,
) -> EvaluatedSet:
    """Return the predictions of a model on a set with labels.

    Args:
        name: Of the set.
        patches: What is evaluated.
        model: The classifier, alone or defended.
        device: Where to compute.
        draws: Draws of the defense's noise; one for a classifier alone.
        seed: Of the draws.
        advance: Called with the number of patches after each batch.
        group: Processes, each of which predicts a part.
    """
    p1 = predict(model.module, patches, device, draws=draws, seed=seed, group=group, advance=advance)
    predictions = Predictions(patches.require_labels(), p1)
    return EvaluatedSet(name, patches.origins(), patches.index, predictions, history(patches.provenance))


@dataclass(frozen=True)
class EvaluateJob:
    """The evaluation of a model on sets with labels.

    Args:
        model: The classifier, alone or defended.
        sets: What is evaluated, with the name of each.
        draws: Draws of the defense's noise; one for a classifier alone.
        seed: Of the draws.
        device: Where to compute.
        shard: Which part of the rows of each set; None for all.
    """

    model: EvaluatedModel
    sets: Sequence[tuple[str, PatchSet]]
    draws: range
    seed: int
    device: torch.device
    shard: Shard | None = None

    @property
    def judging(self) -> JsonObject:
        """How sets are judged."""
        return {"draws": len(self.draws), "seed": self.seed, "precision": self.model.precision}

    @property
    def n(self) -> int:
        """The number of patches of all sets."""
        return sum(len(self._rows(patches)) for _, patches in self.sets)

    def _rows(self, patches: PatchSet) -> RowRange:
        size = judging_batch_size(
            patches.require_shape(), defended=self.model.defense is not None, device=self.device.type
        )
        return shard_rows(len(patches), size, self.shard)

    def part(self, patches: PatchSet) -> PatchSet:
        """Return the rows of a set that are evaluated."""
        rows = self._rows(patches)
        return patches.between(rows.start, rows.stop)

    @property
    def recipe(self) -> Provenance:
        """The recipe of the predictions on all rows."""
        return recipe(
            "evaluate",
            {**self.model.parameters, **self.judging},
            data=[{"name": name, **patches.recipe_input()} for name, patches in self.sets],
            classifier=self.model.fingerprint,
            ddpm=self.model.ddpm_fingerprint,
        )

    def run(
        self, group: ProcessGroup, advance: Callable[[int], None], table: Path | None, *, overwrite: bool
    ) -> list[EvaluatedSet]:
        """Return the sets with their predictions, which processes make together.

        Args:
            group: The processes.
            advance: Called with the number of patches after each batch.
            table: Where predictions are written, or read if this evaluation wrote them before.
            overwrite: Whether another file may be replaced.

        Raises:
            AdvdiffError: Another file is there, the file is an input, or a shard is asked for under torchrun.
        """
        if group.size > 1 and self.shard is not None:
            raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
        if table is None:
            return self._evaluate(group, advance)
        part = part_of(self._rows(self.sets[0][1]))
        made = provenance(self.recipe, device=self.device.type) | ({} if part is None else {"part": part})
        output = OutputSpec(record_of(table), identity(made), self.device.type, overwrite)
        check_replaceable(output, [table], [file for _, patches in self.sets for file in patches.inputs])
        if table.exists() and not overwrite:
            advance(self.n)
            found = zip(read_predictions(table), self.sets, strict=True)
            return [self._checked(table, one, patches) for one, (_, patches) in found]
        evaluated = self._evaluate(group, advance)
        if group.is_main:
            with recorded_write(output, table, made) as temporary:
                keys = (self.part(patches).keys for _, patches in self.sets)
                write_predictions(temporary, list(zip(evaluated, keys, strict=True)))
        return evaluated

    def _checked(self, table: Path, found: EvaluatedSet, patches: PatchSet) -> EvaluatedSet:
        """Return stored predictions on a set, which must be of all rows that this evaluation is about."""
        if not np.array_equal(found.index, self.part(patches).index):
            raise AdvdiffError(f"{table}: the patches of {found.name} are incomplete; merge all shards I/N of one N")
        return replace(found, history=history(patches.provenance))

    def _evaluate(self, group: ProcessGroup, advance: Callable[[int], None]) -> list[EvaluatedSet]:
        return [
            evaluate_set(
                name,
                self.part(patches),
                self.model,
                self.device,
                draws=self.draws,
                seed=self.seed,
                advance=advance,
                group=group,
            )
            for name, patches in self.sets
        ]


def check_certified_model(table: Path, model: EvaluatedModel) -> None:
    """Check that a table of certificates is of the model that is evaluated; warn if it is at another precision.

    Raises:
        AdvdiffError: It is of another model, or there is no such table.
    """
    if model.defense is None:
        raise AdvdiffError("--certificates are of a classifier behind a defense: give -m, or --defense noise")
    made = certificate_provenance(table)["recipe"]
    defense = DefenseSpec.from_parameters({**made["parameters"], "noise": model.defense.spec.noise})  # any is as good
    if ModelSpec(made["classifier"], defense, made["ddpm"], model.precision) != model.spec:
        raise AdvdiffError(f"{table} is of another model, or another setting of the defense; see advdiff info {table}")
    if made["parameters"]["sound"]:
        _log.warning("%s certifies a vote over noise on the 8-bit grid (--sound), not this one", table)
    certified = made["parameters"]["precision"]
    if certified != model.precision:
        _log.warning("%s certifies the purifier in %s, not in %s", table, certified, model.precision)


def certified_of(table: Path, name: str, patches: PatchSet) -> JsonObject:
    """Return what a table of certificates proves of the patches of an evaluated set, which it shares.

    Raises:
        AdvdiffError: It is of other patches.
    """
    made, found = certificate_provenance(table), read_certificates(table)
    parameters = made["recipe"]["parameters"]
    certified, rows = shared_rows((found.fingerprints, found.index), (patches.row_fingerprints(), patches.index))
    if not len(rows):
        raise AdvdiffError(f"{table} certifies other patches than {name}, such as those before an attack")
    if len(rows) < min(len(found), len(patches)):
        text = "%s certifies %d of the %d patches of %s, and %d others"
        _log.warning(text, table, len(rows), len(patches), name, len(found) - len(rows))
    shared = found.take(certified)
    if shared.labels is not None and not np.array_equal(shared.labels, patches.require_labels()[rows]):
        raise AdvdiffError(f"{table} and {name} label the same patches differently")
    return {"data": name, **summarize(shared, told_sizes(parameters)), "alpha": parameters["alpha"]}
