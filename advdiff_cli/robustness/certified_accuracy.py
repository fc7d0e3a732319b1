"""The row `certified` of a suite: what is proved of the vote, and whether an attack breaks a proof.

The true robust accuracy of the vote over infinitely many draws lies between what is proved and what attacks leave.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc
from torch import Tensor

from advdiff_cli.certification.certificate_file import HEADER, CertifiedSet, read_certificates
from advdiff_cli.certification.smoothing import SmoothedClassifier
from advdiff_cli.certification.summary import Radius, summarize
from advdiff_cli.data.distributed import ProcessGroup
from advdiff_cli.data.output_spec import OutputSpec, RowRange
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.table_writer import TableWriter, is_complete_table
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.certify import CertifyJob
from advdiff_cli.jobs.recipes import CertifySettings
from advdiff_cli.jobs.sharding import Shard, ShardedOutput, TableOutput, own_path
from advdiff_cli.models.device import to_device
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.defense import EvaluatedModel
from advdiff_cli.robustness.suite import SuiteRow

ALPHA = 0.001
"""The probability that a certificate of a suite is wrong, at most."""

CHOOSING_DRAWS = 20
"""Draws that choose the class that is certified."""

VOTES = 1000
"""Fresh draws of the vote on an attacked patch that seems to break its certificate."""

_FIRST_VOTE = 1_000_000  # their first draw, beyond those of any certificate
_LEVEL = 1e-4  # of the test that a vote has changed, over all votes
_CHANCE = 0.01  # more broken certificates than alpha explains, with this probability


@dataclass(frozen=True)
class CertifiedAccuracy:
    """The certificates of the patches of a suite.

    Args:
        found: The certificates.
        radius: The size of attacks.
        alpha: The probability that a certificate is wrong, at most.
        sigma: Standard deviation of the noise in pixels of a patch.
    """

    found: CertifiedSet
    radius: Radius
    alpha: float
    sigma: float

    @property
    def proved(self) -> NDArray[np.bool_]:
        """Whether each decision, right or wrong, is certified (N,)."""
        proved: NDArray[np.bool_] = ~self.found.abstain & (self.found.radius >= self.radius.l2)
        return proved

    def suspects(self, rows: Sequence[SuiteRow], judged: Mapping[str, Predictions]) -> list[tuple[str, int]]:
        """Return the attacks within the radius, and patches, where the judging vote is not the certified decision."""
        within = [r.name for r in rows if r.attack and r.name in judged and r.eps <= self.radius.eps * (1 + 1e-9)]
        found = []
        for name in within:
            changed = self.proved & (judged[name].decision != (self.found.decision == 1))
            found += [(name, int(i)) for i in np.flatnonzero(changed)]
        return found

    def summary(self) -> JsonObject:
        """Return the figures of the row."""
        whole = summarize(self.found, [self.radius])
        (certified,) = whole.pop("certified")
        return {**whole, **certified, "alpha": self.alpha, "sigma": self.sigma}


def certify_job(
    model: EvaluatedModel,
    patches: PatchSet,
    eps: float,
    draws: int,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> CertifyJob:
    """Return the job that certifies patches against l-inf attacks of radius `eps`, in fp32.

    Args:
        model: A defended classifier.
        patches: Of one size.
        eps: In [0, 1] pixels.
        draws: That bound the vote of a patch, at most.
        seed: Of the draws.
        batch_size: Draws computed together.
        device: Where to compute.

    Raises:
        AdvdiffError: There is no certificate for these patches, or the classifier depends on more than a patch.
    """
    protected = DefendedClassifier(model.protected.purifier, model.classifier)  # in fp32
    smoothed = SmoothedClassifier(protected, patches.require_shape(), seed)
    smoothed.check_independence(patches.read([0])[0].to(device))
    settings = CertifySettings(CHOOSING_DRAWS, draws, ALPHA, (eps,))
    spec = replace(model.spec, precision="fp32")
    return CertifyJob(smoothed, spec, patches, settings, batch_size, device)


def certify_suite(
    job: CertifyJob, output: OutputSpec, shard: Shard | None, group: ProcessGroup, advance: Callable[[int], None]
) -> CertifiedAccuracy:
    """Make the certificates of a job, or those of this process's part of the patches, and return them.

    Args:
        job: Certifies patches against attacks of one size; its shards hold the rows of those of attacks.
        output: The table.
        shard: The part of the patches; None for all.
        group: Processes that share the work.
        advance: Called with the number of patches done.
    """
    n = len(job.patches)

    def work(writer: TableWriter) -> None:
        advance(int(writer.finished.sum()))
        for count in job.run(writer):
            advance(count)

    ShardedOutput(output, n, job.batch_size, TableOutput(job.patches, HEADER, work)).make_beside(shard, group)
    is_whole = is_complete_table(output.path, job.recipe, RowRange(0, n, n))
    found = read_certificates(own_path(output.path, shard, is_whole=is_whole))
    return CertifiedAccuracy(found, Radius.linf(job.settings.eps[0], job.smoothed.dimension), ALPHA, job.smoothed.sigma)


def votes_for(job: CertifyJob, image: Tensor, name: int, decision: int) -> int:
    """Return how many of `VOTES` fresh draws on an image (3, H, W), of the patch called `name`, are for a class."""
    image, count = to_device(image, job.device), 0
    for start in range(0, VOTES, job.batch_size):
        draws = range(_FIRST_VOTE + start, _FIRST_VOTE + start + job.batch_size)
        votes = job.smoothed.votes(image, name, draws).cpu().numpy()[: VOTES - start]
        count += int((votes == (decision == 1)).sum())
    return count


@dataclass(frozen=True)
class BrokenCertificates:
    """Certificates that attacks seem to break.

    Args:
        patches: All patches, certified or not; each certificate may be wrong with probability alpha.
        certified: Certified ones.
        suspects: Votes that were taken again.
        broken: Patches whose vote is changed by an attack, beyond chance.
    """

    patches: int
    certified: int
    suspects: int
    broken: int

    def is_by_chance(self, alpha: float) -> bool:
        """Return whether so many certificates may be wrong, each with probability `alpha`."""
        return not self.broken or float(bdtrc(self.broken - 1, self.patches, alpha)) >= _CHANCE


def is_changed(votes: int, tests: int) -> bool:
    """Return whether a vote is against the class with so many of `VOTES`, beyond chance, as one of some tests."""
    return float(bdtr(votes, VOTES, 0.5)) < _LEVEL / tests
