"""Fidelity: known changes have known figures, and rows are matched by where they come from."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.stain import mix, separate
from advdiff_cli.evaluation.fidelity import _ratio, nuclear_mass, patch_fidelity


@pytest.fixture(scope="module")
def images(test_x):
    return open_patches(test_x).read(range(4))


def test_nothing_changed(images):
    found = patch_fidelity(images, images)
    assert np.isinf(found.psnr).all()
    assert found.ssim == pytest.approx(np.ones(4))
    assert np.array_equal(found.nuclei_before, found.nuclei_after)


def test_a_known_error_has_a_known_psnr(images):
    shifted = (images * 0.5 + 0.2, images * 0.5 + 0.21)
    assert patch_fidelity(*shifted).psnr == pytest.approx(np.full(4, 40.0), abs=1e-3)  # 10 log10(1 / 0.01^2)


def test_paler_nuclei_lose_their_mass_and_only_the_center_counts(images):
    lost = 0.0
    for image in images[:, None]:
        stains = separate(image)
        before, same = nuclear_mass(image, image)
        stains[:, 0] *= 0.5
        _, paler = nuclear_mass(image, mix(stains))
        assert paler <= same == before  # a patch may have no nucleus in its center
        lost += before - paler
        ring = image.clone()
        ring[..., :30, :] = ring[..., -30:, :] = 1.0
        assert nuclear_mass(image, ring)[1] == before
    assert lost > 0


def test_sets_are_matched_by_row(advdiff, test_x, classifier, ddpm, tmp_path):
    purify = ["purify", test_x, "-m", ddpm, "--t-star", "0.1", "--sampler-steps", 1, "-o", tmp_path / "p.h5"]
    advdiff(*purify, "--range", "4:20")
    evaluate = ["evaluate", test_x, tmp_path / "p.h5", "-c", classifier, "--fidelity"]
    (found,) = advdiff(*evaluate, "--json").json["fidelity"]
    (again,) = advdiff(*evaluate, "--json", "--shuffle-seed", 3).json["fidelity"]
    assert found["n"] == 16
    for name in ("psnr", "ssim", "nuclear_mass"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
        assert again[name]["value"] == pytest.approx(found[name]["value"])
    assert found["flipped"] == again["flipped"]
    whole, part = open_patches(test_x), open_patches(tmp_path / "p.h5")
    by_hand = patch_fidelity(whole.read(range(4, 20)), part.read(range(16)))
    assert found["ssim"]["value"] == pytest.approx(by_hand.ssim.mean())
    assert found["nuclear_mass"]["value"] == pytest.approx(by_hand.nuclei_after.sum() / by_hand.nuclei_before.sum())
    text = advdiff(*evaluate).out
    assert f"fidelity to {test_x}" in text
    assert "decisions changed, label 0 %" in text


def test_one_class_alone_is_told_as_such(advdiff, test_x, classifier, tmp_path):
    one = {"images": torch.rand(4, 3, 96, 96), "labels": torch.ones(4, dtype=torch.long)}
    save_file(one, tmp_path / "one.safetensors")
    evaluate = ["evaluate", tmp_path / "one.safetensors", tmp_path / "one.safetensors", "-c", classifier, "--fidelity"]
    (found,) = advdiff(*evaluate, "--json").json["fidelity"]
    assert found["flipped"]["0"] is None
    assert found["psnr"] is None
    assert "NaN" not in advdiff(*evaluate, "--json").out
    assert "nan" not in advdiff(*evaluate).out.split("fidelity")[1].split("paired")[0]


def test_what_was_made_of_something_else_is_refused(advdiff, test_x, classifier, tmp_path):
    save_file({"images": torch.rand(4, 3, 96, 96), "labels": torch.tensor([0, 1, 0, 1])}, tmp_path / "o.safetensors")
    evaluate = ["evaluate", test_x, "-c", classifier, "--fidelity"]
    assert "was not made from rows of" in advdiff(*evaluate, tmp_path / "o.safetensors", code=1).err
    assert "--fidelity compares sets with the first" in advdiff(*evaluate, code=1).err


def test_where_a_resample_may_hold_no_nucleus_there_is_no_interval():
    before, after, labels = np.array([0.0, 0.0, 4.0]), np.array([1.0, 1.0, 2.0]), np.array([1, 1, 1])
    found = _ratio(before, after, labels)
    assert found == {"value": 1.0, "low": None, "high": None}
    found = _ratio(before + 1, after, labels)
    assert found["low"] < found["value"] == 4 / 7 < found["high"]
