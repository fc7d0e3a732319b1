"""Run a suite: attack, judge and certify."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import escape
from pathlib import Path

import numpy as np
import torch

from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.distributed import ProcessGroup
from advdiff_cli.data.output_spec import OutputSpec, RowRange, shard_rows
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import Provenance, canonical_json, recipe
from advdiff_cli.data.resume import is_complete
from advdiff_cli.data.table_writer import is_complete_table
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.attack import AttackJob, EarlierAttack, Examples
from advdiff_cli.jobs.certify import CertifyJob
from advdiff_cli.jobs.predict import ALONE, predict
from advdiff_cli.jobs.result_cache import cached_predictions, store_predictions
from advdiff_cli.jobs.sharding import PatchSetOutput, Shard, ShardedOutput, own_path
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.defense import Defense, EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec
from advdiff_cli.purification.purifier import NoisePurifier, linear_alpha_bar
from advdiff_cli.robustness.certified_accuracy import CertifiedAccuracy, certify_job, certify_suite
from advdiff_cli.robustness.suite import Budget, SuiteRow
from advdiff_cli.robustness.timing_log import TimingLog, journal_path, recorded_seconds

Advance = Callable[[int], None]

_log = logging.getLogger(__name__)


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
    _proved: dict[str, CertifiedAccuracy] = field(default_factory=dict, init=False, repr=False)

    @property
    def processes(self) -> int:
        """The number of processes that share the work."""
        return self.group.size if self.shard is None else self.shard[1]

    @property
    def own_patches(self) -> int:
        """The number of patches of this process, about."""
        return -(-len(self.patches) // self.processes)

    def _job(self, row: SuiteRow, attack: AttackSpec) -> AttackJob:
        earlier = None if row.after is None else self._earlier(row)
        model = self._attacked_model(row)
        return AttackJob(model, attack, self.patches, self.seed, self.batch_size, self.device, earlier)

    def _earlier(self, row: SuiteRow) -> EarlierAttack:
        """Return the attack that a row goes on from."""
        before = next(r for r in self.suite if r.name == row.after)
        return EarlierAttack(self.judging_recipe(before), row.starts_there, lambda: self._examples(before))

    def _examples(self, row: SuiteRow) -> Examples:
        """Return the examples of a row, and which patches it broke under every judging draw."""
        examples, broken = self.patches_of(row), self.judge(row, lambda count: None).share == 0
        own = shard_rows(len(self.patches), self.batch_size, self.shard)

        def first(n: int) -> int:
            return 0 if n == len(self.patches) else own.start

        kept = np.zeros(len(self.patches), np.bool_)
        start = first(len(broken))  # of all patches, or of this shard
        kept[start : start + len(broken)] = broken
        return Examples(examples, first(len(examples)), kept)

    def patches_of(self, row: SuiteRow) -> PatchSet:
        """Return the attacked patches of a row: all, or those of this shard."""
        if row.attack is None:
            return self.patches
        whole = self._patch_set(row)
        return open_patches(own_path(whole, self.shard, is_whole=is_complete(whole, self._job(row, row.attack).recipe)))

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
        job, out = self._job(row, row.attack), self._patch_set(row)

        def work(writer: PatchWriter) -> None:
            advance(int(writer.finished.sum()))
            with self._timing(job.recipe, restart=not writer.finished.any()) as timing:
                for count in job.run(writer):
                    timing.lap()
                    advance(count)

        output = self._output(out, job.recipe, is_current=is_complete(out, job.recipe))
        made = ShardedOutput(output, len(self.patches), self.batch_size, PatchSetOutput(self.patches, work))
        if made.make_beside(self.shard, self.group) == "up to date":
            advance(self.own_patches)
        elif self.group.is_main:  # what was computed from an earlier file of this name no longer holds
            of_all_models = self.out.glob(f"*{escape(row.name)}.predictions.safetensors")
            for stale in (*of_all_models, self.out / "certified.json"):
                stale.unlink(missing_ok=True)
        self.group.wait()  # before another process looks for them

    def _output(self, path: Path, made_by: Provenance, *, is_current: bool) -> OutputSpec:
        """Return an output of the suite; what is current is not made again, even if others may be replaced."""
        return OutputSpec(path, made_by, self.device.type, self.overwrite and not is_current)

    def judging_draws(self, row: SuiteRow) -> int:
        """Return the number of draws that judge a row."""
        return self.budget.draws if row.judged_on == "all" else 1

    @property
    def _is_random(self) -> bool:
        return isinstance(self.model.module, DefendedClassifier)

    def judging_recipe(self, row: SuiteRow) -> Provenance:
        """Return the recipe of the predictions on a row."""
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
        made_by = self.judging_recipe(row)
        key = canonical_json(made_by)
        if key not in self._judged:
            self._judged[key] = self._judge(row, made_by, advance)
        return self._judged[key]

    def _judge(self, row: SuiteRow, made_by: Provenance, advance: Advance) -> Predictions:
        path, patches = self._predictions(row), self.patches_of(row)
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

    @cached_property
    def certificates(self) -> CertifyJob | None:
        """The job that certifies the patches at the eps of the suite; None where nothing can be certified."""
        eps = next((r.eps for r in self.suite if r.name == "pgd"), None)
        if eps is None or self.model.defense is None:
            return None
        try:
            return self.certify_job(eps)
        except AdvdiffError as e:
            _log.warning("nothing is certified: %s", e)
            return None

    def certify_job(self, eps: float) -> CertifyJob:
        """Return a job that certifies the patches against l-inf attacks of radius `eps`; see `certify_job`."""
        draws, size = self.budget.certify_draws, self.batch_size
        return certify_job(self.model, self.patches, eps, draws, seed=self.seed, batch_size=size, device=self.device)

    def certify(self, job: CertifyJob, advance: Advance) -> CertifiedAccuracy:
        """Make the certificates of a job, or those of this process's part of the patches, and return them."""
        key = canonical_json(job.recipe)
        if key not in self._proved:
            self._proved[key] = self._certify(job, advance)
        return self._proved[key]

    def _certify(self, job: CertifyJob, advance: Advance) -> CertifiedAccuracy:
        out, n = self.out / f"{self.label}certified.csv", len(self.patches)
        is_current = is_complete_table(out, job.recipe, RowRange(0, n, n))
        return certify_suite(job, self._output(out, job.recipe, is_current=is_current), self.shard, self.group, advance)

    def _patch_set(self, row: SuiteRow) -> Path:
        return self.out / f"{row.name}.safetensors"

    def _predictions(self, row: SuiteRow) -> Path:
        return self.out / f"{self.label}{row.name}.predictions.safetensors"

    def seconds(self, row: SuiteRow) -> float:
        """Return how long a row took to make and to judge, over all runs."""
        recipes = [self.judging_recipe(row), *([self._job(row, row.attack).recipe] if row.attack else [])]
        return round(sum(recorded_seconds(self.out, made_by) for made_by in recipes), 1)

    def _timing(self, made_by: Provenance, *, restart: bool = False) -> TimingLog:
        own = journal_path(self.out, *(self.shard or (self.group.rank, self.group.size)))
        return TimingLog(own, made_by, restart=restart)
