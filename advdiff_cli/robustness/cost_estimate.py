"""Estimate what the rows of a suite cost: passes counted before they run, and seconds from passes measured here.

Seconds hold for a machine as busy as it was while they were measured, and for rows that are made from nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.attacks.model_passes import Cost, attack_cost
from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.certification.bounds import linf_as_l2, threshold
from advdiff_cli.certification.confidence_sequence import least_sequential_draws
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.jobs.recipes import judging_batch_size
from advdiff_cli.robustness.binarization import PROBE_PASSES
from advdiff_cli.robustness.certified_accuracy import ALPHA
from advdiff_cli.robustness.runner import SuiteRunner
from advdiff_cli.robustness.suite import SuiteRow
from advdiff_cli.robustness.suite_checks import CHECKED_PATCHES


@dataclass(frozen=True)
class RowCost:
    """The estimated cost of a row: U-Net evaluations for each of n patches, and seconds for all of them."""

    name: str
    n: int
    unet_forward: int
    unet_backward: int
    seconds: float

    def as_dict(self) -> JsonObject:
        """Return the fields."""
        return asdict(self)


@dataclass(frozen=True)
class _PassSeconds:
    """Measured seconds for each patch: of a forward pass and a gradient of the model, and of the classifier alone."""

    forward: float
    gradient: float
    classifier: float

    def of(self, passes: Cost) -> float:
        return passes.forward * self.forward + passes.gradient * self.gradient + passes.classifier * self.classifier


def estimate_costs(runner: SuiteRunner, rows: Sequence[SuiteRow], tested: AttackSpec | None = None) -> list[RowCost]:
    """Return the cost of making and judging each row and, with an attack to be `tested`, of certificates and checks.

    Seconds are those of one of the processes that share the work.
    """
    shared = 1 / runner.processes
    measured, n, defended = _measure_passes(runner), len(runner.patches), runner.model.defense is not None
    judging_size = judging_batch_size(runner.patches.require_shape(), defended=defended, device=runner.device.type)
    made, judged = (_padded(n, size) for size in (runner.batch_size, judging_size))
    found = []
    for row in rows:
        making, judging = _row_passes(runner, row)
        seconds = shared * (measured.of(making) * made + measured.of(judging) * judged)
        found.append(_row_cost(runner, row.name, n, making + judging, seconds))
    if tested is None:
        return found
    if (certifying := _certifying_draws(runner)) is not None:
        cost = Cost(forward=certifying)
        found.append(_row_cost(runner, "certified", n, cost, shared * measured.of(cost) * n))
    few, half = min(CHECKED_PATCHES, n), max(runner.budget.eot // 2, 1)
    checks = {
        "gradients": Cost(forward=1, gradient=2 * half + 1 if defended else 2),
        "unit-test": Cost(forward=PROBE_PASSES, gradient=(tested.steps or 0) + 1),
    }
    return found + [_row_cost(runner, name, few, cost, measured.of(cost) * few) for name, cost in checks.items()]


def _certifying_draws(runner: SuiteRunner) -> int | None:
    """Return the draws that certify a patch of which all draws agree; None if there is no certificate."""
    if (job := runner.certificates) is None:
        return None
    q = threshold(linf_as_l2(job.settings.eps[0], job.smoothed.dimension), job.smoothed.sigma)
    draws = job.settings.n0 + (least_sequential_draws(q, ALPHA, job.settings.n) or 1)
    return -(-draws // job.batch_size) * job.batch_size


def unet_evaluations(runner: SuiteRunner, row: SuiteRow) -> tuple[int, int]:
    """Return the U-Net evaluations of making and judging a row, forward and backward, for each patch."""
    making, judging = _row_passes(runner, row)
    return (making + judging).unet_evaluations(runner.model.sampler_steps)


def _row_cost(runner: SuiteRunner, name: str, n: int, passes: Cost, seconds: float) -> RowCost:
    forward, backward = passes.unet_evaluations(runner.model.sampler_steps)
    return RowCost(name, n, forward, backward, round(seconds, 1))


def _padded(n: int, batch_size: int) -> int:
    """Return how many patches are computed, since the last batch is filled up."""
    return -(-n // batch_size) * batch_size


def _row_passes(runner: SuiteRunner, row: SuiteRow) -> tuple[Cost, Cost]:
    """Return the passes of making a row and those of judging it."""
    has_defense = runner.model.defense is not None
    cost = Cost()
    if row.attack:
        cost = attack_cost(row.attack, defended=has_defense and row.against != "nothing")
    if has_defense and row.against != "defense":  # noise costs nothing compared with the classifier
        cost = Cost(classifier=cost.classifier + cost.gradient + cost.forward)
    return cost, Cost(forward=runner.judging_draws(row) if has_defense else 1)


def _measure_passes(runner: SuiteRunner) -> _PassSeconds:
    """Return the seconds of passes of a full batch, by patch."""
    rows = np.minimum(np.arange(runner.batch_size), len(runner.patches) - 1)
    batch, spec = runner.patches.batch(rows, runner.device), ObjectiveSpec(seed=runner.seed)
    model = Objective(runner.model.module, batch.labels, batch.keys, spec)
    classifier = Objective(runner.model.classifier, batch.labels, batch.keys, spec)

    def fastest(task: Callable[[], object]) -> float:
        times = []
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            task()
            if runner.device.type != "cpu":
                torch.accelerator.synchronize(runner.device)
            times.append(time.perf_counter() - started)
        return min(times) / len(rows)

    return _PassSeconds(
        fastest(lambda: model.value(batch.images, 0)),
        fastest(lambda: model.gradient(batch.images, 0)),
        fastest(lambda: classifier.gradient(batch.images, 0)),
    )
