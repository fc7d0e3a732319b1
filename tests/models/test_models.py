"""Model folders: what diffusers and safetensors make of them, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from bundle_weights import bundle
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from advdiff_cli.data.provenance import recipe
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models import registry
from advdiff_cli.models.card import PICKLED_UNET, UNET_WEIGHTS, PurificationSettings, load_card, save_card
from advdiff_cli.models.classifier_config import ClassifierConfig
from advdiff_cli.models.classifiers import Classifier, read_classifier, save_classifier
from advdiff_cli.models.ddpm import PRESETS, build_ddpm, read_ddpm
from advdiff_cli.models.device import resolve_device, resolve_precision
from advdiff_cli.models.fingerprint import folder_fingerprint


def test_on_cuda_convolutions_are_exact_and_deterministic(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flag in ("deterministic", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, flag, flag == "allow_tf32")
    assert resolve_device("cuda").type == "cuda"
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == (True, False)


def test_diffusers_loads_unet_and_scheduler_unchanged(ddpm):
    ours = read_ddpm(ddpm)
    pipeline = DDPMPipeline.from_pretrained(ddpm)
    unet = UNet2DModel.from_pretrained(ddpm / "unet")
    scheduler = DDPMScheduler.from_pretrained(ddpm / "scheduler")
    for theirs in (pipeline.unet, unet):
        for (name, a), b in zip(ours.unet.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    for theirs in (pipeline.scheduler, scheduler):
        assert torch.equal(ours.alpha_bar, theirs.alphas_cumprod)
        assert (theirs.config.beta_schedule, theirs.config.num_train_timesteps) == ("linear", 1000)


def test_paper_preset_is_the_papers_unet():
    _, arguments = PRESETS["paper"]
    with torch.device("meta"):
        unet = UNet2DModel(sample_size=96, in_channels=3, out_channels=3, **arguments)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(113.7, abs=0.1)
    assert arguments["down_block_types"].index("AttnDownBlock2D") == 4


def test_space_to_depth_is_only_a_permutation(ddpm):
    model = read_ddpm(ddpm)
    x, t = torch.randn(2, 3, 96, 96), torch.tensor([5, 200])
    folded = torch.nn.functional.pixel_unshuffle(x, 2)
    direct = torch.nn.functional.pixel_shuffle(model.unet(folded, t).sample, 2)
    assert torch.allclose(model(x, t), direct, atol=1e-5)
    assert model.multiple == 8


def test_weights_of_a_seed_are_the_same_and_leave_the_global_stream_alone():
    before = torch.random.get_rng_state()
    a, b = build_ddpm("tiny", 96, 1.0, 3), build_ddpm("tiny", 96, 1.0, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_recommendation_is_kept_in_the_card(ddpm, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(ddpm, folder)
    save_card(replace(load_card(folder), recommended=PurificationSettings(0.15, "ddim", 2)), folder)
    assert load_card(folder).recommended == PurificationSettings(0.15, "ddim", 2)
    assert load_card(folder).max_t == 0.3


def test_settings_for_certificates_are_the_recommended_ones_unless_the_card_has_others(ddpm, tmp_path):
    shutil.copytree(ddpm, tmp_path / "m")
    card = load_card(ddpm)
    assert card.default_settings(certify=True) == card.recommended
    save_card(replace(card, certification=PurificationSettings(0.3, "ddpm", 1)), tmp_path / "m")
    card = load_card(tmp_path / "m")
    assert card.default_settings(certify=True) == PurificationSettings(0.3, "ddpm", 1)
    assert card.default_settings(certify=False) == card.recommended
    for invalid in ({"t_star": 2}, {"sampler": "no"}, {"sampler_steps": 0}, {"unknown": 1}):
        raw = json.loads((ddpm / "advdiff.json").read_text()) | {"certification": invalid}
        (tmp_path / "m" / "advdiff.json").write_text(json.dumps(raw))
        with pytest.raises(AdvdiffError, match=r"advdiff\.json"):
            load_card(tmp_path / "m")


def test_bundling_halves_the_weights_and_keeps_the_model(classifier, ddpm, tmp_path):
    for source, weights in ((classifier, "model.safetensors"), (ddpm, "unet/diffusion_pytorch_model.safetensors")):
        target = tmp_path / source.name
        bundle(source, target)
        full, half = (load_file(folder / weights) for folder in (source, target))
        assert all(t.dtype == torch.float16 for t in half.values() if t.is_floating_point())
        assert all(torch.allclose(full[k].float(), half[k].float(), atol=1e-3) for k in full)
    images = torch.rand(2, 3, 96, 96)
    assert torch.allclose(
        read_classifier(classifier)(images), read_classifier(tmp_path / "classifier")(images), atol=1e-2
    )
    assert next(read_ddpm(tmp_path / "ddpm").parameters()).dtype == torch.float32
    assert registry.recorded_recipe(tmp_path / "classifier") == recipe("test", {})


def test_fingerprint_is_of_the_tensors_and_not_of_the_record(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "c")
    save_file(load_file(classifier / "model.safetensors"), tmp_path / "c" / "model.safetensors", {"a": "b", "c": "d"})
    assert folder_fingerprint(tmp_path / "c") == folder_fingerprint(classifier)
    weights = load_file(classifier / "model.safetensors")
    weights["backbone.features.0.bias"] += 1
    save_file(weights, tmp_path / "c" / "model.safetensors")
    assert folder_fingerprint(tmp_path / "c") != folder_fingerprint(classifier)


def test_models_that_do_not_predict_noise_are_refused(ddpm, tmp_path):
    shutil.copytree(ddpm, tmp_path / "m")
    config = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(AdvdiffError, match="predicts v_prediction"):
        read_ddpm(tmp_path / "m")


def test_what_is_recommended_is_not_part_of_the_model(ddpm, tmp_path):
    shutil.copytree(ddpm, tmp_path / "m")
    save_card(replace(load_card(tmp_path / "m"), recommended=PurificationSettings(0.2, "ddim", 3)), tmp_path / "m")
    assert folder_fingerprint(tmp_path / "m") == folder_fingerprint(ddpm)


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "mobilenet_v3_small", "mnasnet0_5", "regnet_y_400mf"])
def test_any_architecture_gives_two_logits(tmp_path, arch):
    model = Classifier(ClassifierConfig(arch, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))).eval()
    save_classifier(model, tmp_path / "c", {})
    images = torch.rand(2, 3, 96, 96)
    back = read_classifier(tmp_path / "c")
    assert torch.equal(back(images), model(images))
    assert back(images).shape == (2, 2)


def test_normalization_is_inside(classifier):
    model = read_classifier(classifier)
    images = torch.rand(1, 3, 96, 96)
    mean, std = torch.tensor([0.7, 0.55, 0.7]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.2]).view(3, 1, 1)
    assert torch.allclose(model(images), model.backbone((images - mean) / std))


def test_unknown_names_list_what_there_is(tmp_path):
    with pytest.raises(
        AdvdiffError, match="no classifier is called nonesuch: it is neither a folder nor a bundled model"
    ):
        registry.find_classifier("nonesuch")
    with pytest.raises(AdvdiffError, match="no classification architecture resnet19"):
        Classifier(ClassifierConfig("resnet19", (0, 0, 0), (1, 1, 1)))
    with pytest.raises(AdvdiffError, match=r"config\.json is missing"):
        read_classifier(tmp_path)
    with pytest.raises(AdvdiffError, match="is not a diffusion model folder"):
        read_ddpm(tmp_path)


NAME = "backbone.classifier.1.bias"


def test_weights_that_do_not_fit_are_refused(classifier, tmp_path):
    weights = load_file(classifier / "model.safetensors")
    (tmp_path / "config.json").write_text((classifier / "config.json").read_text())
    wrong = {
        r"1 of its 52 tensors are missing, and 0 others are there, such as \w+\.": dict(list(weights.items())[1:]),
        r"0 of its 52 tensors are missing, and 1 others are there, such as more": {**weights, "more": torch.zeros(2)},
        r"classifier\.1\.bias has shape \[3\], and \[2\] is needed": {**weights, NAME: torch.zeros(3)},
    }
    for why, changed in wrong.items():
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(AdvdiffError, match=rf"model\.safetensors does not fit squeezenet1_1: {why}"):
            read_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(AdvdiffError, match=r"model\.safetensors is not a complete safetensors file"):
        read_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"arch": "resnet18"}))
    with pytest.raises(AdvdiffError, match="is not a classifier config"):
        read_classifier(tmp_path)


def test_weights_without_counts_of_batches_are_read(tmp_path):
    """As old versions of torch wrote them, and converters do."""
    folder = registry.find_classifier("synthetic-classifier")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    assert 0 < len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    images = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(read_classifier(tmp_path)(images), read_classifier(folder)(images))


def test_a_missing_device_is_an_error():
    if torch.cuda.is_available():
        assert resolve_device("auto").type == "cuda"
    else:
        with pytest.raises(AdvdiffError, match="--device cuda"):
            resolve_device("cuda")
        assert resolve_device("auto").type in ("cpu", "mps")
    with pytest.raises(AdvdiffError, match="fp16 needs a GPU"):
        resolve_precision("fp16", torch.device("cpu"))


def test_a_stray_file_does_not_change_the_fingerprint_of_a_pickled_model(ddpm, tmp_path):
    pickled = shutil.copytree(ddpm, tmp_path / "pickled")
    torch.save(load_file(pickled / UNET_WEIGHTS), pickled / PICKLED_UNET)
    (pickled / UNET_WEIGHTS).unlink()
    before = folder_fingerprint(pickled)
    save_file({"x": torch.zeros(1)}, pickled / "stray.safetensors")
    assert folder_fingerprint(pickled) == before
    state = torch.load(pickled / PICKLED_UNET, weights_only=True)
    torch.save({k: v + 1 for k, v in state.items()}, pickled / PICKLED_UNET)
    assert folder_fingerprint(pickled) != before
