"""Which patches a later attack of a suite leaves alone: those that are broken, and those that are certified."""

import numpy as np
import pytest
import torch
from torch import nn

from advdiff_cli.data.patches import open_patches
from advdiff_cli.jobs.attack import AttackJob
from advdiff_cli.purification.defense import Defense, EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec
from advdiff_cli.purification.purifier import NoisePurifier, linear_alpha_bar
from advdiff_cli.robustness.runner import SuiteRunner
from advdiff_cli.robustness.suite import Budget, build_suite

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


def test_broken_and_certified_patches_are_left_alone(runner, monkeypatch):
    rows = {row.name: row for row in runner.suite}
    runner.attack(rows["pgd"], lambda count: None)
    judged = runner.judge(rows["pgd"], lambda count: None)
    bright = runner.patches.read(range(N)).mean((1, 2, 3)).numpy()
    far = np.abs(bright - 0.5) > 0.05  # too far for an attack of 2/255
    assert ((judged.share == 0) == ((bright > 0.5) != (runner.patches.labels == 1)))[far].all()
    proved = runner.certify(runner.certificates, lambda count: None).proved
    assert proved[far].all()

    for eps, at_eps in ((EPS, True), (4 / 255, False)):
        kept = runner._examples(rows["pgd"], eps).kept
        assert kept.tolist() == ((judged.share == 0) | (proved & at_eps)).tolist()
    attacked = []
    real = AttackJob._attack
    monkeypatch.setattr(
        AttackJob, "_attack", lambda job, packs, earlier=None: attacked.extend(packs) or real(job, packs, earlier)
    )
    runner.attack(rows["apgd-ce"], lambda count: None)
    assert not set(np.concatenate([np.empty(0, int), *attacked]).tolist()) & set(np.flatnonzero(proved).tolist())
    pgd, after = (open_patches(runner.out / f"{name}.safetensors").read(range(N)) for name in ("pgd", "apgd-ce"))
    assert torch.equal(after[proved], pgd[proved])
