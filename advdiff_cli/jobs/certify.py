"""Certify every patch of a set: each by its own draws, so that no patch depends on which others are certified."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from advdiff_cli.certification.bounds import linf_as_l2
from advdiff_cli.certification.certificate import Certificate, Certifier, Procedure
from advdiff_cli.certification.certificate_file import line
from advdiff_cli.certification.smoothing import SmoothedClassifier
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.table_writer import TableWriter
from advdiff_cli.jobs.memory import parallel_batches
from advdiff_cli.jobs.parallel_map import parallel_map
from advdiff_cli.jobs.recipes import CertifySettings, certify_recipe
from advdiff_cli.models.device import to_device
from advdiff_cli.models.external import TwoLogits
from advdiff_cli.purification.defense_spec import ModelSpec

_AHEAD = 16  # patches begun while an earlier one takes many draws


@dataclass(frozen=True)
class CertifyJob:
    """Certificates for every patch of a set, with or without labels.

    Args:
        smoothed: What is certified.
        spec: What its results depend on.
        patches: The rows, of one size.
        settings: How.
        batch_size: Draws computed together, all of one patch.
        device: Where to compute.
    """

    smoothed: SmoothedClassifier
    spec: ModelSpec
    patches: PatchSet
    settings: CertifySettings
    batch_size: int
    device: torch.device

    @cached_property
    def recipe(self) -> Provenance:
        """The recipe of the table."""
        derived = {"sigma": self.smoothed.sigma, "dimension": self.smoothed.dimension}
        return certify_recipe(
            self.spec, self.patches, self.settings, seed=self.smoothed.seed, batch_size=self.batch_size, derived=derived
        )

    @cached_property
    def procedure(self) -> Procedure:
        """How a patch is certified."""
        s, targets = self.settings, None
        if s.is_sequential:
            targets = (*(linf_as_l2(eps, self.smoothed.dimension) for eps in s.eps), *s.radii)
        return Procedure(s.n0, s.n, s.alpha, targets)

    def run(self, writer: TableWriter) -> Iterator[int]:
        """Certify the rows that `writer` does not have yet, yielding the number of rows after each."""
        batches, fingerprints = list(writer.batches(1)), self.patches.row_fingerprints()
        rows = [int(batch.rows[0]) for batch in batches]
        with writer:
            for i, batch, (certificate, seconds) in zip(rows, batches, self.certificates(rows), strict=True):
                label = None if self.patches.labels is None else int(self.patches.labels[i])
                name, index = str(self.patches.keys[i]), int(self.patches.index[i])
                writer.write(batch, [line(name, index, label, certificate, seconds, fingerprints[i])])
                yield 1

    def certificates(self, rows: Sequence[int]) -> Iterator[tuple[Certificate, float]]:
        """Yield the certificate of each row, in order, and the seconds that it took.

        Raises:
            AdvdiffError: The classifier depends on more than the patch.
        """
        model = self.smoothed.model
        external = any(isinstance(m, TwoLogits) for m in model.modules())  # may hold state, so one batch at a time
        shape = self.patches.require_shape()
        workers = 0 if external else parallel_batches(model, shape, self.batch_size, self.device)
        for row in rows[:1]:
            self.smoothed.check_independence(self._read(row)[1][0])
        yield from parallel_map(self._read, self._certify, rows, workers, depth=_AHEAD)

    def _read(self, row: int) -> tuple[int, Tensor]:
        return int(self.patches.index[row]), to_device(self.patches.read([row]), self.device)

    def _certify(self, one: tuple[int, Tensor]) -> tuple[Certificate, float]:
        """Return the certificate of a patch, and the seconds that it took."""
        index, images = one  # the index in the origin set, which names the noise
        started, begun = time.perf_counter(), 0
        certifier = Certifier(self.procedure, self.smoothed.sigma, self.smoothed.distance)
        while not certifier.is_decided:
            draws = range(begun, begun + self.batch_size)
            certifier.add(self.smoothed.votes(images[0], index, draws).cpu().numpy().astype(np.bool_))
            begun += self.batch_size
        return certifier.certify(), time.perf_counter() - started
