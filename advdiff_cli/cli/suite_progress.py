"""Run a suite of attacks and show its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from advdiff_cli import console
from advdiff_cli.cli.progress import duration

if TYPE_CHECKING:
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.evaluation.metrics import Predictions
    from advdiff_cli.robustness.certified_accuracy import CertifiedAccuracy
    from advdiff_cli.robustness.cost_estimate import RowCost
    from advdiff_cli.robustness.runner import SuiteRunner
    from advdiff_cli.robustness.suite import SuiteRow

Result = TypeVar("Result")


@dataclass(frozen=True)
class SuiteProgress:
    """A suite, run with its progress on stderr.

    Args:
        runner: Runs each row.
        suite: The rows.
        plan: What each row and, for a whole suite, each check costs.
        eps: Of the attacks.
        quiet: Whether nothing is shown.
    """

    runner: SuiteRunner
    suite: Sequence[SuiteRow]
    plan: Mapping[str, RowCost]
    eps: float
    quiet: bool

    def run_shard(self) -> None:
        """Attack and certify part of the patches."""
        self._certify()
        for row in self.suite:
            self._attack(row)
            if any(r.after == row.name for r in self.suite):
                self._judge(row)

    def run(self) -> JsonObject:
        """Run every row and what else is planned, and return the content of robustness.json.

        Of several processes, the main one checks the attacks; the result of the others is empty.
        """
        from advdiff_cli.robustness.suite_checks import SuiteChecks
        from advdiff_cli.robustness.summary import summarize

        runner, judged, gradients, tested, certified = self.runner, {}, None, None, None
        proofs, checks = self._certify(), SuiteChecks(self.runner)
        for row in self.suite:
            self._attack(row)
            judged[row.name] = self._judge(row)
        if not runner.group.is_main:
            return {}
        if "gradients" in self.plan:  # of a whole suite
            attack = next(r.attack for r in self.suite if r.name == "pgd")
            assert attack is not None
            gradients = self._follow("gradients", checks.gradients)
            tested = self._follow("unit-test", lambda advance: checks.binarization_test(attack, advance))
            if proofs is not None and runner.certificates is not None:
                certified = proofs, checks.certificates(runner.certificates, proofs, judged)
        summary = summarize(self.suite, judged, self.eps, gradients, tested, certified)
        for row, printed in zip(self.suite, summary["rungs"], strict=True):
            cost = self.plan[row.name]
            printed |= {"unet_forward": cost.unet_forward, "unet_backward": cost.unet_backward}
            printed["seconds"] = runner.seconds(row)
        defense = None if runner.model.defense is None else runner.model.defense.spec.parameters()
        made_by = {"recipe": self._recipe(), "eps": self.eps, "defense": defense}
        return {"out": str(runner.out), **made_by, **summary}

    def write_predictions(self, path: Path) -> None:
        """Write the predictions on clean patches, and under each patch's worst attack, as `evaluate` writes them."""
        from advdiff_cli.data.atomic_files import atomic_write
        from advdiff_cli.evaluation.comparison import EvaluatedSet
        from advdiff_cli.evaluation.predictions_csv import write_predictions
        from advdiff_cli.robustness.worst_case import worst_case

        patches = self.runner.patches
        judged = {row.name: self.runner.judge(row, lambda count: None) for row in self.suite}
        worst = f"worst linf {self.eps * 255:g}/255"
        cases = {"clean": judged["clean"], worst: worst_case(self.suite, judged, self.eps)[1]}
        sets = [EvaluatedSet(name, patches.origins(), patches.index, found) for name, found in cases.items()]
        with atomic_write(path) as temporary:
            write_predictions(temporary, [(one, patches.keys) for one in sets])

    def _recipe(self) -> Provenance:
        from advdiff_cli.data.provenance import recipe

        runner, model = self.runner, self.runner.model
        settings = {"eps": self.eps, **asdict(runner.budget), "seed": runner.seed, "batch_size": runner.batch_size}
        return recipe(
            "robustness",
            {**settings, **model.parameters},
            data=runner.patches.recipe_input(),
            classifier=model.fingerprint,
            ddpm=model.ddpm_fingerprint,
        )

    def _attack(self, row: SuiteRow) -> None:
        self._log(f"{row.name}: {cost_text(self.plan[row.name])}")
        if row.attack:
            with console.progress(self.runner.own_patches, f"{row.name}: attack", quiet=self.quiet) as advance:
                self.runner.attack(row, advance)

    def _judge(self, row: SuiteRow) -> Predictions:
        with console.progress(self.runner.own_patches, f"{row.name}: judge", quiet=self.quiet) as advance:
            found = self.runner.judge(row, advance)
        self._log(f"{row.name}: accuracy {100 * found.share.mean():.1f} %, {duration(self.runner.seconds(row))}")
        return found

    def _certify(self) -> CertifiedAccuracy | None:
        """Certify the patches, as part of a whole suite."""
        job = self.runner.certificates
        if "certified" not in self.plan or job is None:
            return None
        proofs = self._follow("certified", lambda advance: self.runner.certify(job, advance))
        self._log(f"certified: {100 * proofs.summary()['value']:.1f} % proved, {duration(proofs.summary()['seconds'])}")
        return proofs

    def _log(self, text: str) -> None:
        if not self.quiet:
            console.log(text)

    def _follow(self, name: str, work: Callable[[Callable[[int], None]], Result]) -> Result:
        """Do planned work, and show its cost and its progress."""
        self._log(f"{name}: {cost_text(self.plan[name])}")
        with console.progress(self.plan[name].n, name, quiet=self.quiet) as advance:
            return work(advance)


def cost_text(cost: RowCost) -> str:
    """Return what a row costs, in words."""
    unet = f"{cost.unet_forward:,} + {cost.unet_backward:,} U-Net evaluations a patch (forward + backward), "
    return f"{unet if cost.unet_forward else ''}about {duration(cost.seconds)}"
