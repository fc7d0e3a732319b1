"""Run a suite: attack and judge each row, and check the gradients and the attacks themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from advdiff_cli.attacks.eot import ObjectiveSpec
from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.certification.certificate_file import HEADER, read_certificates
from advdiff_cli.certification.smoothing import SmoothedClassifier
from advdiff_cli.certification.summary import Radius
from advdiff_cli.data.distributed import ProcessGroup
from advdiff_cli.data.output_spec import OutputSpec, RowRange, shard_rows
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import PatchSet, open_patches
from advdiff_cli.data.provenance import JsonObject, Provenance, canonical_json, digest, recipe
from advdiff_cli.data.resume import is_complete
from advdiff_cli.data.table_writer import TableWriter, is_complete_table
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.attack import AttackJob, EarlierAttack, Examples
from advdiff_cli.jobs.certify import CertifyJob
from advdiff_cli.jobs.predict import ALONE, predict
from advdiff_cli.jobs.recipes import CertifySettings, default_batch_size
from advdiff_cli.jobs.result_cache import cached_predictions, cached_result, store_predictions, store_result
from advdiff_cli.jobs.sharding import PatchSetOutput, Shard, ShardedOutput, TableOutput, part_path
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.defense import Defense, EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec
from advdiff_cli.purification.purifier import NoisePurifier, linear_alpha_bar
from advdiff_cli.robustness.binarization import BinarizationResult, run_binarization_test
from advdiff_cli.robustness.certified_rung import BrokenCertificates, CertifiedRung, is_changed, votes_for
from advdiff_cli.robustness.gradient_checks import GradientFindings, check_gradients
from advdiff_cli.robustness.suite import Budget, SuiteRow
from advdiff_cli.robustness.timing_log import TimingLog, journal_path, recorded_seconds

Advance = Callable[[int], None]

ALPHA = 0.001
"""The probability that a certificate of a suite is wrong, at most."""

CHOOSING_DRAWS = 20
"""Draws that choose the class that is certified."""

CHECKED_PATCHES = 64
"""Patches whose gradients are checked, and with which attacks are tested."""


@dataclass(frozen=True)
class SuiteRunner:
    """Runs rows of a suite on one model.

    Args:
        model: What is evaluated.
        patches: The rows, with labels, of one size.
        budget: What attacks may spend, and how many draws judge.
        out: The folder of results: NAME.safetensors and NAME.predictions.safetensors for each row, certified.csv,
            NAME.json for each check, and seconds.jsonl for each process.
        seed: Of attacks and judging draws.
        batch_size: Patches attacked together.
        device: Where to compute.
        overwrite: Whether results of another recipe may be replaced.
        label: Prefix of prediction files, where several models share the folder.
        group: Processes that share the work.
        shard: The part of the rows that is attacked and certified; None for all.
        suite: All rows, among which those are that others come after.
    """

    model: EvaluatedModel
    patches: PatchSet
    budget: Budget
    out: Path
    seed: int
    batch_size: int
    device: torch.device
    overwrite: bool = False
    label: str = ""
    group: ProcessGroup = ALONE
    shard: Shard | None = None
    suite: Sequence[SuiteRow] = ()
    _judged: dict[str, Predictions] = field(default_factory=dict, init=False, repr=False)

    @property
    def processes(self) -> int:
        """The number of processes that share the work."""
        return self.group.size if self.shard is None else self.shard[1]

    @property
    def own_patches(self) -> int:
        """The number of patches of this process, about."""
        return -(-len(self.patches) // self.processes)

    def _job(self, row: SuiteRow, attack: AttackSpec) -> AttackJob:
        earlier = None
        if row.after is not None:
            before = next(r for r in self.suite if r.name == row.after)
            load = partial(self._examples, before)
            earlier = EarlierAttack(self._judging_recipe(before), row.starts_there, load)
        model = self._attacked_model(row)
        return AttackJob(model, attack, self.patches, self.seed, self.batch_size, self.device, earlier)

    def _examples(self, row: SuiteRow) -> Examples:
        """Return the examples of a row, and which patches it broke under every judging draw."""
        examples = self._patches_of(row)
        is_whole = len(examples) == len(self.patches)
        first = 0 if is_whole else shard_rows(len(self.patches), self.batch_size, self.shard).start
        broken = np.zeros(len(self.patches), np.bool_)
        broken[first : first + len(examples)] = self.judge(row, lambda count: None).share == 0
        return Examples(examples, first, broken)

    def _patches_of(self, row: SuiteRow) -> PatchSet:
        """Return the attacked patches of a row: all, or those of this shard."""
        if row.attack is None:
            return self.patches
        path = self.out / f"{row.name}.safetensors"
        return open_patches(path if self.shard is None or path.exists() else part_path(path, *self.shard))

    def _attacked_model(self, row: SuiteRow) -> EvaluatedModel:
        """Return the model that a row's attack is made against."""
        if row.against == "defense":
            return self.model
        if row.against == "nothing" or self.model.defense is None:
            return replace(self.model, defense=None)
        own = self.model.defense.spec
        spec = DefenseSpec("noise", own.t_star, noise=own.noise)
        purifier = NoisePurifier(linear_alpha_bar(), spec.t_star, spec.noise).to(self.device)
        return replace(self.model, defense=Defense(purifier, spec, None))

    def attack(self, row: SuiteRow, advance: Advance) -> None:
        """Make the patch set of a row, or this process's part of it."""
        if row.attack is None:
            return
        job, out = self._job(row, row.attack), self.out / f"{row.name}.safetensors"

        def work(writer: PatchWriter) -> None:
            advance(int(writer.finished.sum()))
            with self._timing(job.recipe, restart=not writer.finished.any()) as timing:
                for count in job.run(writer):
                    timing.lap()
                    advance(count)

        output = self._output(out, job.recipe, is_current=is_complete(out, job.recipe))
        made = ShardedOutput(output, len(self.patches), self.batch_size, PatchSetOutput(self.patches, work))
        made.make_beside(self.shard, self.group)

    def _output(self, path: Path, made_by: Provenance, *, is_current: bool) -> OutputSpec:
        """Return an output of the suite; what is current is not made again, even if others may be replaced."""
        return OutputSpec(path, made_by, self.device.type, self.overwrite and not is_current)

    def judging_draws(self, row: SuiteRow) -> int:
        """Return the number of draws that judge a row."""
        return self.budget.draws if row.judged_on == "all" else 1

    @property
    def _is_random(self) -> bool:
        return isinstance(self.model.module, DefendedClassifier)

    def _judging_recipe(self, row: SuiteRow) -> Provenance:
        judging = {"draws": self.judging_draws(row), "seed": self.seed} if self._is_random else {}
        return recipe(
            "judge",
            {**judging, **self.model.parameters},
            data=self._job(row, row.attack).recipe if row.attack else self._data,
            classifier=self.model.fingerprint,
            ddpm=self.model.ddpm_fingerprint,
        )

    @cached_property
    def _data(self) -> Provenance:
        return self.patches.recipe_input()

    def judge(self, row: SuiteRow, advance: Advance) -> Predictions:
        """Return the predictions on a row, over the draws that judge every row; on its shard, if that is all."""
        made_by = self._judging_recipe(row)
        key = canonical_json(made_by)
        if key not in self._judged:
            self._judged[key] = self._judge(row, made_by, advance)
        return self._judged[key]

    def _judge(self, row: SuiteRow, made_by: Provenance, advance: Advance) -> Predictions:
        path, patches = self.out / f"{self.label}{row.name}.predictions.safetensors", self._patches_of(row)
        is_whole = len(patches) == len(self.patches)
        if is_whole and (found := cached_predictions(path, made_by, overwrite=self.overwrite)):
            advance(len(found.labels))
            return found
        draws = range(self.judging_draws(row) if self._is_random else 1)
        module, group = self.model.module, self.group
        with self._timing(made_by, restart=True):
            p1 = predict(module, patches, self.device, draws=draws, seed=self.seed, group=group, advance=advance)
        predictions = Predictions(patches.require_labels(), p1)
        if is_whole and group.is_main:
            store_predictions(path, made_by, predictions, patches.index)
        return predictions

    def certify_job(self, eps: float) -> CertifyJob:
        """Return the job that certifies the patches against l-inf attacks of radius `eps`.

        Raises:
            AdvdiffError: There is no certificate for these patches, or the classifier depends on more than a patch.
        """
        protected = DefendedClassifier(self.model.protected.purifier, self.model.classifier).eval()  # in fp32
        smoothed = SmoothedClassifier(protected, self.patches.require_shape(), self.seed)
        smoothed.check_independence(self.patches.read([0])[0].to(self.device))
        settings = CertifySettings(CHOOSING_DRAWS, self.budget.certify_draws, ALPHA, (eps,))
        spec = replace(self.model.spec, precision="fp32")
        size = default_batch_size(self.device.type, graph=False)
        return CertifyJob(smoothed, spec, self.patches, settings, size, self.device)

    def certify(self, job: CertifyJob, eps: float, advance: Advance) -> CertifiedRung:
        """Return the certificates of `certify_job`, made by all processes."""
        out = self.make_certificates(job, advance)
        radius = Radius.linf(eps, job.smoothed.dimension)
        return CertifiedRung(read_certificates(out), radius, ALPHA, job.smoothed.sigma)

    def make_certificates(self, job: CertifyJob, advance: Advance) -> Path:
        """Make the table of `certify_job`, or this process's part of it, and return where the whole table is."""
        out, n = self.out / f"{self.label}certified.csv", len(self.patches)
        is_current = is_complete_table(out, job.recipe, RowRange(0, n, n))

        def work(writer: TableWriter) -> None:
            advance(int(writer.finished.sum()))
            for count in job.run(writer):
                advance(count)

        output = self._output(out, job.recipe, is_current=is_current)
        made = ShardedOutput(output, n, 1, TableOutput(self.patches, HEADER, work))
        made.make_beside(self.shard, self.group)
        return out

    def check_certificates(
        self, job: CertifyJob, rung: CertifiedRung, rows: Sequence[SuiteRow], judged: Mapping[str, Predictions]
    ) -> BrokenCertificates:
        """Return the certificates that attacks break, on fresh draws of the vote."""
        suspects = rung.suspects(rows, judged)

        def check() -> JsonObject:
            broken, opened = set(), {n: open_patches(self.out / f"{n}.safetensors") for n in {n for n, _ in suspects}}
            for name, i in suspects:
                votes = votes_for(job.smoothed, opened[name], i, int(rung.found.decision[i]), self.device)
                if is_changed(votes, len(suspects)):
                    broken.add(i)
            return {"broken": len(broken)}

        recipes = [canonical_json(self._judging_recipe(r)).encode() for r in rows]
        found = self._cached_check("certified", {"certificates": job.recipe, "attacks": digest(recipes)}, check)
        return BrokenCertificates(len(rung.found), int(rung.proved.sum()), len(suspects), int(found["broken"]))

    def check_gradients(self, advance: Advance) -> GradientFindings:
        """Return findings about the gradients at the first clean patches."""
        settings = {"eot": self.budget.eot, "seed": self.seed, "rows": CHECKED_PATCHES}

        def check() -> JsonObject:
            spec = ObjectiveSpec("margin", max(self.budget.eot // 2, 1), seed=self.seed)
            few = self.patches.first(CHECKED_PATCHES)
            return check_gradients(self.model.module, few, spec, self.batch_size, self.device, advance).as_dict()

        return GradientFindings.from_dict(self._cached_check("gradients", settings, check))

    def binarization_test(self, attack: AttackSpec, advance: Advance) -> BinarizationResult | None:
        """Return how many planted adversarial examples an attack finds; None if none can be planted."""

        def test() -> JsonObject:
            few = self.patches.first(CHECKED_PATCHES)
            job = AttackJob(self.model, attack, few, self.seed, self.batch_size, self.device)
            found = run_binarization_test(job, advance)
            return {} if found is None else found.as_dict()

        settings = {**attack.parameters(), "seed": self.seed, "rows": CHECKED_PATCHES}
        found = self._cached_check("unit-test", settings, test)
        return BinarizationResult.from_dict(found) if found else None

    def _cached_check(self, name: str, settings: JsonObject, compute: Callable[[], JsonObject]) -> JsonObject:
        m, path = self.model, self.out / f"{name}.json"
        parameters = {**settings, **m.parameters}
        made_by = recipe(name, parameters, data=self._data, classifier=m.fingerprint, ddpm=m.ddpm_fingerprint)
        found = cached_result(path, made_by, overwrite=self.overwrite)
        if found is None:
            found = compute()
            store_result(path, made_by, found)
        return found

    def seconds(self, row: SuiteRow) -> float:
        """Return how long a row took to make and to judge, over all runs."""
        recipes = [self._judging_recipe(row), *([self._job(row, row.attack).recipe] if row.attack else [])]
        return round(sum(recorded_seconds(self.out, made_by) for made_by in recipes), 1)

    def _timing(self, made_by: Provenance, *, restart: bool = False) -> TimingLog:
        own = journal_path(self.out, *(self.shard or (self.group.rank, self.group.size)))
        return TimingLog(own, made_by, restart=restart)
