"""Started by torchrun: data commands give one process's rows, training its curve; one process at a time writes."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from advdiff_cli.data.distributed import process_group
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.patches import open_patches

pytestmark = pytest.mark.slow


needs_gpus = pytest.mark.skipif(
    "config.getoption('--device') == 'cuda' and torch.cuda.device_count() < 2", reason="training needs two GPUs"
)


def torchrun(*arguments, code=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "--", "advdiff_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_rows_of_a_file(advdiff, test_x, classifier, tmp_path):
    attack = ["attack", test_x, "-c", classifier, "--steps", 2, "--batch-size", 4, "--limit", 14]
    one, two = tmp_path / "one.h5", tmp_path / "two.h5"
    alone = advdiff(*attack, "-o", one, "--json").json
    shared = json.loads(torchrun(*attack, "-o", two, "--json").stdout)
    assert shared | {"out": ""} == alone | {"out": ""}
    assert open_patches(two).fingerprint() == open_patches(one).fingerprint()
    assert open_patches(two).provenance["recipe"] == open_patches(one).provenance["recipe"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.h5", "two.h5"]
    assert "up to date" in advdiff(*attack, "-o", two).err
    told = torchrun(*attack, "--eps", "1/255", "-o", two, code=1).stderr  # before the work, not after it
    assert "was made with other settings" in told
    assert "attack:" not in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.h5", "two.h5"]


def test_lines_of_a_table(advdiff, test_x, classifier, tmp_path):
    predict = ["predict", test_x, "-c", classifier, "--defense", "noise", "--t-star", "0.1", "--limit", 20]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    alone = advdiff(*predict, "-o", one, "--json").json
    assert json.loads(torchrun(*predict, "-o", two, "--json").stdout) | {"out": ""} == alone | {"out": ""}
    assert two.read_bytes() == one.read_bytes()
    assert "up to date" in advdiff(*predict, "-o", two).err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.csv", "one.csv.advdiff", "two.csv", "two.csv.advdiff"]


def test_an_evaluation(advdiff, test_x, classifier, tmp_path):
    evaluate = ["evaluate", test_x, "-c", classifier, "--defense", "noise", "--draws", 3, "--limit", 40, "--json"]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    alone = advdiff(*evaluate, "--predictions", one).json
    assert json.loads(torchrun(*evaluate, "--predictions", two).stdout) == alone
    assert two.read_bytes() == one.read_bytes()


def test_a_suite(advdiff, test_x, classifier, tmp_path):
    suite = ["robustness", test_x, "-c", classifier, "--preset", "quick", "--only", "pgd", "--limit", 10, "--json"]
    suite += ["--batch-size", 4]
    alone = advdiff(*suite, "-o", tmp_path / "one").json
    advdiff(*suite, "-o", tmp_path / "two", "--shard", "0/2")  # as processes leave it that were stopped
    shared = json.loads(torchrun(*suite, "-o", tmp_path / "two").stdout)
    for one, two in zip(alone["rungs"], shared["rungs"], strict=True):
        assert two | {"seconds": 0} == one | {"seconds": 0}
    assert (
        open_patches(tmp_path / "two" / "pgd.safetensors").fingerprint()
        == open_patches(tmp_path / "one" / "pgd.safetensors").fingerprint()
    )
    names = {p.name for p in (tmp_path / "one").iterdir()} - {"seconds.jsonl"}
    assert {p.name for p in (tmp_path / "two").iterdir()} == names | {"seconds.0of2.jsonl", "seconds.1of2.jsonl"}


def test_certificates(advdiff, test_x, classifier, tmp_path):
    certify = ["certify", test_x, "-c", classifier, "--defense", "noise", "--limit", 6, "--n", 30]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    advdiff(*certify, "-o", one)
    torchrun(*certify, "-o", two)
    alone, shared = (
        [line | {"seconds": None} for line in csv.DictReader(p.read_text().splitlines())] for p in (one, two)
    )
    assert shared == alone
    assert "up to date" in advdiff(*certify, "-o", two).err


def test_rows_that_fit_one_batch(advdiff, test_x, classifier, tmp_path):
    attack = [
        "attack",
        test_x,
        "-c",
        classifier,
        "--steps",
        1,
        "--batch-size",
        4,
        "--limit",
        3,
        "-o",
        tmp_path / "a.h5",
    ]
    assert json.loads(torchrun(*attack, "--json").stdout)["status"] == "done"
    assert "up to date" in advdiff(*attack).err


def test_files_of_a_folder(advdiff, ddpm, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / "in" / f"{i}.png")
    purify = ["purify", tmp_path / "in", "-m", ddpm, "--t-star", "0.02", "--sampler-steps", 1]
    advdiff(*purify, "-o", tmp_path / "one")
    told = json.loads(torchrun(*purify, "-o", tmp_path / "two", "--json").stdout)
    assert (told["files"], told["purified"], told["failed"]) == (5, 5, 0)
    for file in (tmp_path / "one").glob("*.png"):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if p.suffix != ".png") == ["advdiff.jsonl"]
    assert advdiff(*purify, "-o", tmp_path / "two", "--json").json["status"] == "up to date"


@needs_gpus
def test_training_follows_the_curve_of_one_process(advdiff, test_x, tmp_path, monkeypatch):
    """Each batch is split between the processes: other noise and other augmentations, the same loss but for those."""
    train = ["train-ddpm", test_x, "--valid", test_x, "--preset", "tiny", "--steps", 12, "--batch-size", 16]
    train += ["--precision", "fp32", "--max-t", "0.3", "--learning-rate", "1e-3"]
    advdiff(*train, "-o", tmp_path / "one")
    torchrun(*train, "-o", tmp_path / "two")
    one, two = (json.loads((tmp_path / k / "training.jsonl").read_text().splitlines()[-1]) for k in ("one", "two"))
    assert one["step"] == two["step"] == 12
    assert two["loss"] == pytest.approx(one["loss"], rel=0.05)
    for level, loss in one["valid_loss"].items():
        assert two["valid_loss"][level] == pytest.approx(loss, rel=0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    refused = advdiff(*train, "-o", tmp_path / "two", code=1)
    assert "processes 2 -> unset" in refused.err
    monkeypatch.setenv("RANK", "0")  # as torchrun does
    monkeypatch.setenv("WORLD_SIZE", "2")
    uneven = advdiff(*train[:-8], "--batch-size", 3, "-o", tmp_path / "three", code=1)
    assert "--batch-size 3 cannot be shared evenly by 2 processes" in uneven.err


@needs_gpus
def test_a_classifier_is_published_once(advdiff, test_x, tmp_path):
    train = ["train-classifier", test_x, "--valid", test_x, "--arch", "squeezenet1_1", "--epochs", 2]
    train += ["--batch-size", 20, "--precision", "fp32"]
    done = torchrun(*train, "-o", tmp_path / "c")
    assert "published" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors", "training.jsonl"]
    advdiff("evaluate", test_x, "-c", tmp_path / "c", "--limit", 4)


def test_one_process_at_a_time(advdiff, test_x, ddpm, tmp_path):
    commands = {
        "p.h5": ["purify", test_x, "-m", ddpm, "--t-star", "0.02", "--sampler-steps", 1, "--limit", 2],
        "d": ["train-ddpm", test_x, "--preset", "tiny", "--steps", 1, "--batch-size", 2],
    }
    for name, command in commands.items():
        with OutputLock(tmp_path / name):
            assert "is being written by another process" in advdiff(*command, "-o", tmp_path / name, code=1).err
        advdiff(*command, "-o", tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "p.h5"]


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as group:
        assert group.is_main
        assert group.sum([2, 3]) == [2, 3]
