"""Publishing a model: nothing of anybody else is touched, and what was there is never lost."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from advdiff_cli.models.card import UNET_WEIGHTS
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.training import checkpoints
from advdiff_cli.training.fit_classifier import BEST


class Killed(BaseException):
    """In place of kill -9."""


@pytest.fixture
def train(advdiff, test_x, tmp_path):
    def run(*extra, code=0, out=tmp_path / "m", steps=1):
        command = ["train-ddpm", test_x, "--steps", steps, "--batch-size", 4, "--preset", "tiny"]
        return advdiff(*command, "-o", out, *extra, code=code)

    return run


def test_a_folder_called_old_is_nobody_s_business(train, tmp_path):
    old = tmp_path / "m.old"
    old.mkdir()
    (old / "precious").write_text("mine")
    train()
    train("--seed", 1, "--overwrite")
    assert (old / "precious").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.old"]


def test_the_target_of_a_link_is_replaced(train, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "model")
    train()
    first = folder_fingerprint(tmp_path / "disk" / "model")
    train("--seed", 1, "--overwrite")
    assert (tmp_path / "m").is_symlink()
    assert folder_fingerprint(tmp_path / "m") != first
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["model"]


def test_killed_between_the_two_renames(train, tmp_path, monkeypatch):
    train()
    first = folder_fingerprint(tmp_path / "m")
    replace = os.replace

    def dies(source, target):
        if os.fspath(target) == os.fspath(tmp_path / "m"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", dies)
    with pytest.raises(Killed):
        train("--seed", 1, "--overwrite")
    monkeypatch.undo()
    assert not (tmp_path / "m").exists()
    train("--seed", 2, "--overwrite", "--learning-rate", 0, code=1)  # another command fails
    shutil.copytree(tmp_path / "m.part", tmp_path / "copy.part")
    train("--seed", 1)  # the same command, which may not replace anything now
    second = folder_fingerprint(tmp_path / "m")
    assert second != first
    assert not (tmp_path / "m.part").exists()
    train("--seed", 2, "--overwrite", out=tmp_path / "copy")
    assert folder_fingerprint(tmp_path / "copy") not in (first, second)


def test_the_earlier_model_comes_back_where_another_training_begins(train, tmp_path, monkeypatch):
    train()
    first = folder_fingerprint(tmp_path / "m")
    (tmp_path / "m.part").mkdir()
    (tmp_path / "m").rename(tmp_path / "m.part" / "previous")

    def stop(*_):
        raise Killed

    monkeypatch.setattr(checkpoints, "_replace", stop)
    with pytest.raises(Killed):
        train("--seed", 2, "--overwrite")
    assert folder_fingerprint(tmp_path / "m") == first


@pytest.mark.parametrize("command", ["train-ddpm", "train-classifier"])
@pytest.mark.parametrize("out", [".", ".."])
def test_an_output_without_a_name(advdiff, test_x, command, out):
    assert f"--out {out}: give the name of a folder" in advdiff(command, test_x, "-o", out, code=1).err


def test_training_that_diverges_publishes_nothing(train, tmp_path):
    assert "must be above 0 and finite" in train("--learning-rate", "inf", code=1).err
    assert "give a lower --learning-rate" in train("--learning-rate", "1e30", steps=4, code=1).err
    assert not (tmp_path / "m").exists()
    assert "the trained weights are not finite" in train("--learning-rate", "3e38", out=tmp_path / "n", code=1).err


def test_a_model_of_nan_purifies_nothing(train, advdiff, test_x, tmp_path):
    train()
    weights = load_file(tmp_path / "m" / UNET_WEIGHTS)
    save_file({k: torch.full_like(v, np.nan) for k, v in weights.items()}, tmp_path / "m" / UNET_WEIGHTS)
    assert (
        "not finite; train the model again"
        in advdiff("purify", test_x, "-m", tmp_path / "m", "-o", tmp_path / "p.h5", code=1).err
    )


def test_an_overflow_of_the_unet_is_not_a_black_image(train, advdiff, test_x, tmp_path):
    train()
    weights = load_file(tmp_path / "m" / UNET_WEIGHTS)
    weights["conv_out.bias"] += 3e38
    weights["conv_norm_out.bias"] += 1e30
    save_file(
        {k: v.clamp(-3e38, 3e38) * (1e30 if k == "conv_out.weight" else 1) for k, v in weights.items()},
        tmp_path / "m" / UNET_WEIGHTS,
    )
    assert all(bool(p.isfinite().all()) for p in read_ddpm(tmp_path / "m").parameters())
    told = advdiff("purify", test_x, "-m", tmp_path / "m", "-o", tmp_path / "p.h5", "--limit", 2, code=1).err
    assert "purified patches are not finite" in told
    assert not (tmp_path / "p.h5").exists()


@pytest.mark.parametrize("name", ["checkpoint.safetensors", BEST, "recipe.json", "training.jsonl"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "garbage"])
def test_damaged_training_begins_again_or_is_refused(advdiff, test_x, tmp_path, name, damage, monkeypatch):
    command = ["train-classifier", test_x, "--valid", test_x, "--epochs", 2, "--batch-size", 4]
    command += ["--arch", "shufflenet_v2_x0_5", "--precision", "fp32"]
    whole = tmp_path / "whole"
    advdiff(*command, "-o", whole)
    log = checkpoints.WorkFolder.save

    def dies(work, tensors, state, name="checkpoint.safetensors"):
        log(work, tensors, state, name)
        if name == "checkpoint.safetensors":
            raise Killed

    monkeypatch.setattr(checkpoints.WorkFolder, "save", dies)
    with pytest.raises(Killed):
        advdiff(*command, "-o", tmp_path / "m")
    monkeypatch.undo()
    file = tmp_path / "m.part" / name
    raw = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        raw[len(raw) // 2] ^= 16
        file.write_bytes({"truncate": raw[: len(raw) // 3], "flip": raw, "garbage": b"[" * 3000 + b"\n"}[damage])
    refused = name == "recipe.json"
    told = advdiff(*command, "-o", tmp_path / "m", code=int(refused)).err
    if refused:
        assert "--overwrite" in told
        advdiff(*command, "-o", tmp_path / "m", "--overwrite")
    elif damage != "remove" and name != "training.jsonl":
        assert "damaged" in told
    assert folder_fingerprint(tmp_path / "m") == folder_fingerprint(whole)
    if damage in ("remove", "truncate"):
        assert (tmp_path / "m" / "training.jsonl").read_bytes() == (whole / "training.jsonl").read_bytes()


@pytest.mark.parametrize("damage", ["removed", "garbage"])
def test_a_finished_model_whose_log_is_damaged_is_told_and_complete(advdiff, test_x, tmp_path, damage):
    train = ["train-ddpm", test_x, "--preset", "tiny", "--steps", 2, "--batch-size", 2, "-o", tmp_path / "d"]
    advdiff(*train)
    log = tmp_path / "d" / "training.jsonl"
    log.unlink() if damage == "removed" else log.write_bytes(b"\x86\xff{\n")
    told = advdiff(*train, "--json")
    assert "training.jsonl is missing or damaged; the model beside it is complete" in told.err
    assert "up to date" in told.err
    assert told.json["log"] == []
