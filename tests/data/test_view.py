"""Views: what is read of a patch, and what that does to perturbations."""

import pytest
import torch

from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.view import WHOLE, View
from advdiff_cli.errors import AdvdiffError


def images(side=96):
    return torch.rand((2, 3, side, side), generator=torch.Generator().manual_seed(0))


def test_a_view_is_the_center_then_averages():
    x = images()
    assert View(64).apply(x).shape == (2, 3, 64, 64)
    assert torch.equal(View(64).apply(x), x[..., 16:80, 16:80])
    pooled = View(64, 2).apply(x)
    assert pooled.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pooled[..., 3, 5], x[..., 22:24, 26:28].mean((-1, -2)))
    assert View(64, 2).shape(96, 96) == (32, 32)
    assert View(64, 2).cropped(96, 96) == (64, 64)
    assert WHOLE.apply(x) is x
    assert View(pool=3).apply(x).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("view", [View(64), View(64, 2), View(96, 3)])
def test_perturbations_do_not_grow(view):
    x, changed = images(), images().flip(0)
    apart, whole = (view.apply(changed) - view.apply(x)).flatten(1), (changed - x).flatten(1)
    assert (apart.abs().amax(1) <= whole.abs().amax(1) + 1e-6).all()
    assert (apart.norm(dim=1) <= whole.norm(dim=1) / view.pool + 1e-5).all()


def test_a_view_of_some_rows_is_of_those_rows(test_x):
    patches, view = open_patches(test_x), View(64, 2)
    few = patches.between(3, 7)
    for seen in (few.viewed(view), few.in_memory().viewed(view)):
        assert seen.index.tolist() == few.index.tolist()
        assert torch.equal(seen.read([0, 3]), view.apply(patches.read([3, 6])))


def test_patches_that_do_not_fit_are_told():
    for view, side, text in (
        (View(64), 48, "smaller than the center crop of 64"),
        (View(pool=5), 96, "cannot be averaged in squares of 5"),
        (View(32, 2), 96, "at least 64"),
    ):
        with pytest.raises(AdvdiffError, match=text):
            view.shape(side, side)
    for crop, pool in ((0, 1), (33, 2), (64, 0), (64, 33), (6.5, 1), ("64", 1)):
        with pytest.raises(ValueError, match="crop"):
            View(crop, pool)


def test_a_model_knows_what_it_was_trained_on():
    assert WHOLE.covers(View(64))
    assert View(64).covers(View(32))
    assert View(64, 2).covers(View(64, 2))
    assert not View(32).covers(View(64))
    assert not View(64).covers(WHOLE)
    assert not WHOLE.covers(View(64, 2))
