"""The synthetic tissue: deterministic, labeled, and not told apart by color."""

import numpy as np

from advdiff_cli.datasets.synthetic import SyntheticSource
from advdiff_cli.evaluation.metrics import auroc


def test_a_patch_depends_on_seed_and_index_alone():
    few, many = SyntheticSource(5, 1), SyntheticSource(50, 1)
    assert np.array_equal(few.read(np.array([4])), many.read(np.array([4])))
    assert np.array_equal(few.labels, many.labels[:5])
    assert not np.array_equal(few.read(np.array([4])), SyntheticSource(5, 2).read(np.array([4])))


def test_looks_like_stained_tissue():
    images = SyntheticSource(32, 0).read(np.arange(32)) / 255
    red, green, blue = images.mean((0, 2, 3))
    assert green < blue < 0.95
    assert green < red < 0.95
    assert images.min() < 0.3
    assert images.max() > 0.95


def test_mean_color_does_not_tell_the_label():
    source = SyntheticSource(300, 0)
    means = source.read(np.arange(300)).mean((2, 3))
    for channel in means.T:
        assert 0.35 < auroc(source.labels, channel) < 0.65
