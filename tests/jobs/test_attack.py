"""An attack that goes on from another one: what that broke is kept, and the rest is attacked as it would be anyway."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from advdiff_cli.attacks.spec import AttackRequest, resolve
from advdiff_cli.data.output_spec import OutputSpec, shard_rows
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import open_patches
from advdiff_cli.jobs.attack import AttackJob, EarlierAttack, Examples
from advdiff_cli.models.registry import load_frozen_classifier
from advdiff_cli.purification.defense import EvaluatedModel

N, B = 14, 4
SPEC = resolve("pgd", "linf", 2 / 255, AttackRequest(steps=2), defended=False)
BROKEN = np.array([i in (0, 1, 2, 3, 5, 9, 13) for i in range(N)])


@pytest.fixture
def job(test_x, classifier):
    model = EvaluatedModel(*load_frozen_classifier(str(classifier), torch.device("cpu")))
    return AttackJob(model, SPEC, open_patches(test_x).first(N), 0, B, torch.device("cpu"))


def attack(job, out, shard=None, stop=None):
    """Attack into a file, or stop after some batches; return what it holds."""
    writer = PatchWriter(OutputSpec(out, job.recipe), job.patches, shard_rows(N, B, shard))
    for done, _ in enumerate(job.run(writer), 1):
        if done == stop:
            raise KeyboardInterrupt
    return open_patches(out).read(np.arange(len(writer.rows))).numpy()


@pytest.fixture
def going_on(job, tmp_path):
    examples = attack(replace(job, seed=7), tmp_path / "examples.h5")
    found = Examples(open_patches(tmp_path / "examples.h5"), 0, BROKEN)
    return examples, replace(job, earlier=EarlierAttack({"command": "judge"}, False, lambda: found))


def test_what_was_broken_is_kept_and_the_rest_is_attacked(job, going_on, tmp_path):
    examples, later = going_on
    alone, after = attack(job, tmp_path / "alone.h5"), attack(later, tmp_path / "after.h5")
    np.testing.assert_array_equal(after[BROKEN], examples[BROKEN])
    np.testing.assert_array_equal(after[~BROKEN], alone[~BROKEN])  # to the bit, in other batches
    assert not (after[~BROKEN] == examples[~BROKEN]).all()


def test_interrupted_or_in_shards_it_is_the_same(going_on, tmp_path):
    _, later = going_on
    whole = attack(later, tmp_path / "whole.h5")
    with pytest.raises(KeyboardInterrupt):
        attack(later, tmp_path / "stopped.h5", stop=2)
    np.testing.assert_array_equal(attack(later, tmp_path / "stopped.h5"), whole)
    shards = [attack(later, tmp_path / f"{i}.h5", (i, 2)) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(shards), whole)


def test_it_may_start_at_the_examples(job, going_on, tmp_path):
    examples, later = going_on
    starting = replace(later, earlier=replace(later.earlier, is_start=True))
    assert starting.recipe != later.recipe != job.recipe
    found = attack(starting, tmp_path / "found.h5")
    np.testing.assert_array_equal(found[BROKEN], examples[BROKEN])
    labels = torch.from_numpy(job.patches.labels)
    before, after = (
        torch.nn.functional.cross_entropy(job.model.module(torch.from_numpy(x)), labels, reduction="none")
        for x in (examples, found)
    )
    assert (after >= before - 1e-5).all()
    assert (after > before + 1e-5)[torch.from_numpy(~BROKEN)].any()
