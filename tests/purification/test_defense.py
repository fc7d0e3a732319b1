"""Patches of a size that the models were not trained on are judged, and the size is told."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from advdiff_cli.models.classifier_config import ClassifierConfig, read_classifier_config
from advdiff_cli.models.ddpm import build_ddpm, read_ddpm
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.models.registry import BUNDLED

PCAM = ["-c", "pcam-resnet18"]


@pytest.fixture
def large(tmp_path):
    """Four patches of 224x224."""
    images = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"images": images, "labels": torch.arange(4) % 2}, tmp_path / "large.safetensors")
    return tmp_path / "large.safetensors"


@pytest.mark.parametrize(
    "command",
    [
        ["predict", *PCAM, "-o", "p.csv"],
        ["evaluate", *PCAM],
        ["attack", *PCAM, "--method", "fgsm", "-o", "adv.h5"],
        ["certify", *PCAM, "--defense", "noise", "--n0", "1", "--n", "1", "--limit", "1", "-o", "c.csv"],
        ["robustness", *PCAM, "--limit", "2", "--only", "random", "-o", "suite"],
    ],
    ids=lambda command: command[0],
)
def test_another_size_is_told(command, advdiff, large, test_x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = advdiff(command[0], large, *command[1:]).err
    assert f"the patches of {large} are 224x224, but the classifier was trained on 96x96" in told
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    limit = [] if "--limit" in command else ["--limit", "2"]
    assert "was trained on" not in advdiff(command[0], test_x, *command[1:], *limit).err


def test_a_diffusion_model_tells_its_size_too(advdiff, large, classifier, ddpm):
    told = advdiff("evaluate", large, "-c", classifier, "-m", ddpm, "--t-star", 0.1, "--sampler-steps", 1).err
    assert "are 224x224, but the diffusion model was trained on 96x96" in told
    assert read_ddpm(ddpm).trained_size == (96, 96)
    assert build_ddpm("tiny", 64, 0.3, 0).trained_size == (64, 64)


def test_training_records_the_size_of_whole_patches(advdiff, test_x, tmp_path):
    train = ["train-classifier", test_x, "--arch", "shufflenet_v2_x0_5", "--epochs", 1, "--batch-size", 40]
    advdiff(*train, "--crop", 64, "-o", tmp_path / "model")
    assert read_classifier_config(tmp_path / "model")[0].size == (96, 96)


def test_the_size_changes_no_fingerprint(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "synthetic-classifier", folder)
    config, before = json.loads((folder / "config.json").read_text()), folder_fingerprint(folder)
    assert read_classifier_config(folder)[0].size == (96, 96)
    (folder / "config.json").write_text(json.dumps({**config, "size": None}))
    assert read_classifier_config(folder)[0].size is None
    assert folder_fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "slope": 2.0}))
    assert folder_fingerprint(folder) != before
    with pytest.raises(ValueError, match="height and width"):
        ClassifierConfig("resnet18", (0, 0, 0), (1, 1, 1), size=(96,))
