"""The purification that is asked for: its recipe, which earlier work may tell, and the job with the model loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from advdiff_cli.cli.compute_options import ShardedComputeOptions
from advdiff_cli.cli.defense_options import PurifierOptions
from advdiff_cli.cli.output_options import PlannedOutputOptions

if TYPE_CHECKING:
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import Provenance
    from advdiff_cli.jobs.purify_rows import PurifyJob


@dataclass(frozen=True)
class PurifyPlan:
    """What is to be done: the recipe is known before the model is loaded, where there is earlier work."""

    purifier: PurifierOptions
    compute: ShardedComputeOptions
    patches: PatchSet | None
    resume: Mapping[str, object]

    @cached_property
    def job(self) -> PurifyJob:
        """The job, with the model loaded."""
        from advdiff_cli.cli.batch_size import resolve_batch_size
        from advdiff_cli.data.view import WHOLE
        from advdiff_cli.jobs.purify_rows import PurifyJob
        from advdiff_cli.purification.defended_classifier import check_view

        shape, n = None, None
        if self.patches is not None:
            shape, n = self.patches.require_shape(), len(self.patches)
        device = self.compute.resolve_device()
        precision = self.compute.resolve_precision(device, self.resume)
        defense = self.purifier.build(self.compute, self.resume)
        check_view(defense.purifier, WHOLE)
        module = defense.purifier.to(device)
        asked = self.compute.batch_size
        size = resolve_batch_size(asked, self.resume, module, shape, device, graph=False, n=n)
        return PurifyJob(defense, self.compute.seed, size, precision, device)

    def spec(self, output: PlannedOutputOptions) -> OutputSpec:
        """Return a folder to be made by the job."""
        from advdiff_cli.data.output_spec import OutputSpec

        return OutputSpec(output.out, self.job.recipe(), self.job.device.type, output.overwrite)

    @cached_property
    def known(self) -> tuple[Provenance, int] | None:
        """The recipe and the batch size, if earlier work tells what would be taken from the machine; else None."""
        from advdiff_cli.cli.batch_size import known_batch_size
        from advdiff_cli.jobs.recipes import purify_recipe

        precision = self.compute.known_precision(self.resume)
        size = known_batch_size(self.compute.batch_size, self.resume)
        found = self.purifier.find(self.compute, self.resume) if self.resume else None
        if found is None or precision is None or size is None:
            return None
        seed = self.compute.seed
        return purify_recipe(*found, self.patches, seed=seed, batch_size=size, precision=precision), size
