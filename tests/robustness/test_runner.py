"""The rows of a suite: which patches a later attack leaves alone, what is made anew, and certificates under attack."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from advdiff_cli.data.patches import open_patches
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs.attack import AttackJob
from advdiff_cli.purification.defense import Defense, EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec
from advdiff_cli.purification.purifier import NoisePurifier, linear_alpha_bar
from advdiff_cli.robustness.runner import SuiteRunner
from advdiff_cli.robustness.suite import Budget, build_suite
from advdiff_cli.robustness.suite_checks import SuiteChecks

CPU, EPS, N = torch.device("cpu"), 2 / 255, 8
BUDGET = Budget(N, 2, 1, 2, 3, 700)


class Brightness(nn.Module):
    """Class 1 where a patch is bright, whatever noise is added, so that votes agree."""

    def forward(self, x):
        score = 1000 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def runner(test_x, tmp_path):
    purifier = NoisePurifier(linear_alpha_bar(), 0.3)
    model = EvaluatedModel(Brightness(), "brightness").behind(
        Defense(purifier, DefenseSpec("noise", 0.3), None), CPU, "fp32"
    )
    rows = build_suite(BUDGET, EPS, defended=True, transfer=False)
    (tmp_path / "suite").mkdir()
    return SuiteRunner(model, open_patches(test_x).first(N), BUDGET, tmp_path / "suite", 0, 4, CPU, suite=rows)


def test_broken_patches_are_left_alone_and_certified_ones_are_not(runner, monkeypatch):
    """A certificate is of the vote; the mean over draws of a certified patch can still fall."""
    rows = {row.name: row for row in runner.suite}
    runner.attack(rows["pgd"], lambda count: None)
    judged = runner.judge(rows["pgd"], lambda count: None)
    bright = runner.patches.read(range(N)).mean((1, 2, 3)).numpy()
    far = np.abs(bright - 0.5) > 0.05  # too far for an attack of 2/255
    broken = judged.share == 0
    assert (broken == ((bright > 0.5) != (runner.patches.labels == 1)))[far].all()
    proved = runner.certify(runner.certificates, lambda count: None).proved
    assert proved[far].all()
    assert (proved & ~broken).any()
    attacked = []
    real = AttackJob._attack
    monkeypatch.setattr(
        AttackJob, "_attack", lambda job, packs, earlier=None: attacked.extend(packs) or real(job, packs, earlier)
    )
    runner.attack(rows["apgd-ce"], lambda count: None)
    assert set(np.concatenate(attacked).tolist()) == set(np.flatnonzero(~broken).tolist())
    pgd, after = (open_patches(runner.out / f"{name}.safetensors").read(range(N)) for name in ("pgd", "apgd-ce"))
    assert torch.equal(after[broken], pgd[broken])


@pytest.mark.parametrize("defended", [True, False])
def test_only_apgd_goes_on_from_another_attack(defended):
    """Any other row would hide that it is weaker than the attack with which it is compared."""
    rows = build_suite(BUDGET, EPS, defended=defended)
    assert {row.name: row.after for row in rows if row.after} == {"apgd-ce": "pgd", "apgd-margin": "apgd-ce"}


def test_a_wrong_certificate_is_found(runner):
    rows = [row for row in runner.suite if row.name in ("clean", "pgd")]
    runner.attack(rows[1], lambda count: None)
    judged = {row.name: runner.judge(row, lambda count: None) for row in rows}
    job, checks = runner.certificates, SuiteChecks(runner)
    certified = runner.certify(job, lambda count: None)
    assert certified.proved.any()
    right = checks.certificates(job, certified, judged)
    assert (right.certified, right.broken) == (certified.proved.sum(), 0)
    (runner.out / "certified.json").unlink()
    decision = certified.found.decision.copy()
    wrong = np.flatnonzero(certified.proved)[-1]
    decision[wrong] = 1 - decision[wrong]
    found = checks.certificates(job, replace(certified, found=replace(certified.found, decision=decision)), judged)
    assert (found.suspects, found.broken) == (1, 1)


def test_a_new_patch_set_is_judged_anew(runner):
    """Predictions are of a file, not of its recipe alone: another machine may have made a slightly different one."""
    row = next(row for row in runner.suite if row.name == "fgsm")
    runner.attack(row, lambda count: None)
    for label in ("", "other-"):  # as models of a sweep share a set
        replace(runner, label=label).judge(row, lambda count: None)
    assert len(list(runner.out.glob("*.predictions.safetensors"))) == 2
    (runner.out / "fgsm.safetensors").unlink()
    runner.attack(row, lambda count: None)
    assert not list(runner.out.glob("*.predictions.safetensors"))


def test_shards_do_not_read_what_they_overwrite(runner):
    """A whole file of another recipe is not the earlier attack that a shard goes on from."""
    runner = replace(runner, budget=replace(BUDGET, certify_draws=30))
    rows = {row.name: row for row in runner.suite}
    for name in ("pgd", "apgd-ce"):
        runner.attack(rows[name], lambda count: None)
    reseeded = replace(runner, seed=1, overwrite=True)
    for i in (0, 1):
        shard = replace(reseeded, shard=(i, 2))
        for name in ("pgd", "apgd-ce"):
            shard.attack(rows[name], lambda count: None)
        assert len(shard.patches_of(rows["pgd"])) == N // 2
        part = shard.out / f"pgd.{i}of2.safetensors"
        written = part.stat().st_mtime_ns
        replace(shard).attack(rows["pgd"], lambda count: None)
        assert part.stat().st_mtime_ns == written  # finished, and not made again
    for name in ("pgd", "apgd-ce"):
        reseeded.attack(rows[name], lambda count: None)
    (runner.out.parent / "fresh").mkdir()
    fresh = replace(reseeded, out=runner.out.parent / "fresh", overwrite=False)
    for name in ("pgd", "apgd-ce"):
        fresh.attack(rows[name], lambda count: None)
        one, other = (open_patches(r.out / f"{name}.safetensors").read(range(N)) for r in (reseeded, fresh))
        assert torch.equal(one, other)


def test_a_suite_of_one_patch_ends(runner):
    one = replace(runner, patches=runner.patches.first(1))
    found = SuiteChecks(one).gradients(lambda count: None)
    assert found.cosine.value <= 1
    assert np.isnan(found.cosine.low)
    again = SuiteChecks(one).gradients(lambda count: None)  # from its file
    assert again.cosine.value == found.cosine.value
    assert np.isnan(again.cosine.low)


def test_a_damaged_file_is_named(runner):
    path = runner.out / "fgsm.safetensors"
    path.write_bytes(b"not a patch set")
    row = next(row for row in runner.suite if row.name == "fgsm")
    with pytest.raises(AdvdiffError, match="is damaged, or was not made by advdiff"):
        runner.attack(row, lambda count: None)
