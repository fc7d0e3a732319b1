"""The checks of a suite, made once: of gradients, of the attack, and of certificates under attack."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from advdiff_cli.attacks.eot import ObjectiveSpec
from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.provenance import JsonObject, canonical_json, digest, recipe
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.attack import AttackJob
from advdiff_cli.jobs.certify import CertifyJob
from advdiff_cli.jobs.result_cache import cached_result, store_result
from advdiff_cli.robustness.binarization import BinarizationResult, run_binarization_test
from advdiff_cli.robustness.certified_accuracy import BrokenCertificates, CertifiedAccuracy, is_changed, votes_for
from advdiff_cli.robustness.gradient_checks import GradientFindings, check_gradients
from advdiff_cli.robustness.runner import Advance, SuiteRunner

CHECKED_PATCHES = 64
"""Patches whose gradients are checked, and with which attacks are tested."""


@dataclass(frozen=True)
class SuiteChecks:
    """The checks of a suite, each stored as NAME.json in its folder."""

    runner: SuiteRunner

    def certificates(
        self, job: CertifyJob, certified: CertifiedAccuracy, judged: Mapping[str, Predictions]
    ) -> BrokenCertificates:
        """Return the certificates that attacks break, on fresh draws of the vote."""
        runner = self.runner
        rows = [r for r in runner.suite if r.name in judged]

        def check() -> JsonObject:
            suspects = certified.suspects(rows, judged)
            opened = {r.name: runner.patches_of(r) for r in rows if r.name in {name for name, _ in suspects}}
            images = {}  # by patch and content, since later rows keep examples of earlier ones
            for name, i in suspects:
                image = opened[name].read([i])[0]
                images[i, image.numpy().tobytes()] = image
            broken = set()
            for (i, _), image in images.items():
                votes = votes_for(job, image, int(runner.patches.index[i]), int(certified.found.decision[i]))
                if is_changed(votes, len(images)):
                    broken.add(i)
            return {"suspects": len(images), "broken": len(broken)}

        recipes = [canonical_json(runner.judging_recipe(r)).encode() for r in rows]
        found = self._cached("certified", {"certificates": job.recipe, "attacks": digest(recipes)}, check)
        return BrokenCertificates(len(certified.found), int(certified.proved.sum()), found["suspects"], found["broken"])

    def gradients(self, advance: Advance) -> GradientFindings:
        """Return findings about the gradients at the first clean patches."""
        runner = self.runner
        settings = {"eot": runner.budget.eot, "seed": runner.seed, "rows": CHECKED_PATCHES}

        def check() -> JsonObject:
            spec = ObjectiveSpec("margin", max(runner.budget.eot // 2, 1), seed=runner.seed)
            few, size = runner.patches.first(CHECKED_PATCHES), runner.batch_size
            return check_gradients(runner.model.module, few, spec, size, runner.device, advance).as_dict()

        return GradientFindings.from_dict(self._cached("gradients", settings, check))

    def binarization_test(self, attack: AttackSpec, advance: Advance) -> BinarizationResult | None:
        """Return how many planted adversarial examples an attack finds; None if none can be planted."""
        runner = self.runner

        def test() -> JsonObject:
            few = runner.patches.first(CHECKED_PATCHES)
            job = AttackJob(runner.model, attack, few, runner.seed, runner.batch_size, runner.device)
            found = run_binarization_test(job, advance)
            return {} if found is None else found.as_dict()

        settings = {**attack.parameters(), "seed": runner.seed, "rows": CHECKED_PATCHES}
        found = self._cached("unit-test", settings, test)
        return BinarizationResult.from_dict(found) if found else None

    def _cached(self, name: str, settings: JsonObject, compute: Callable[[], JsonObject]) -> JsonObject:
        runner, m = self.runner, self.runner.model
        path, parameters = runner.out / f"{name}.json", {**settings, **m.parameters}
        data = runner.patches.recipe_input()
        made_by = recipe(name, parameters, data=data, classifier=m.fingerprint, ddpm=m.ddpm_fingerprint)
        found = cached_result(path, made_by, overwrite=runner.overwrite)
        if found is None:
            found = compute()
            store_result(path, made_by, found)
        return found
