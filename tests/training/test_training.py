"""Fits resume to the same weights; the EMA is what is published; order belongs to (seed, epoch)."""

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import recipe
from advdiff_cli.data.rng import stream
from advdiff_cli.data.selection import Selection
from advdiff_cli.data.view import View
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.classifier_config import ClassifierConfig
from advdiff_cli.models.classifiers import Classifier, read_classifier
from advdiff_cli.models.ddpm import Ddpm, build_ddpm, read_ddpm
from advdiff_cli.purification.equations import forward_process
from advdiff_cli.purification.purifier import NoisePurifier, linear_alpha_bar
from advdiff_cli.training import loader
from advdiff_cli.training.adversarial import TrainingInput
from advdiff_cli.training.augmentation import random_symmetry, vary_stain
from advdiff_cli.training.checkpoint_file import load_optimizer, optimizer_tensors
from advdiff_cli.training.checkpoints import WorkFolder
from advdiff_cli.training.fit_classifier import CLEAN, ClassifierFit, channel_statistics
from advdiff_cli.training.fit_ddpm import DdpmFit
from advdiff_cli.training.loader import TrainingRows, in_memory_for_gpu
from advdiff_cli.training.optim import cosine
from advdiff_cli.training.platt import fit_platt
from advdiff_cli.training.recipes import Adversary, ClassifierRecipe, DdpmRecipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(test_x):
    return TrainingRows([open_patches(test_x)], labeled=True)


def work(folder, name="m"):
    return WorkFolder(OutputSpec(folder / name, recipe("test", {})), None)


def classifier_fit(
    rows, valid, folder, steps=None, name="m", inputs=CLEAN, arch="shufflenet_v2_x0_5", ema=None, line=(1.0, 0.0)
):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(ClassifierConfig(arch, (0.7, 0.5, 0.7), (0.2, 0.2, 0.2), *line))
    plan = ClassifierRecipe(2, 8, 1e-3, 0.01, 0.05, 0, "fp32", ema=ema)
    fit = ClassifierFit(model, rows, valid, plan, work(folder, name), CPU, inputs, checkpoint_seconds=0)
    made = list(itertools.islice(fit.run(), steps))
    return model, made


def dropout_fit(*args, **named):
    return classifier_fit(*args, **named, arch="mobilenet_v3_small")


def averaged_fit(*args, **named):
    return classifier_fit(*args, **named, ema=0.9)


def adversarial_fit(*args, **named):
    purifier = NoisePurifier(linear_alpha_bar(), 0.1, "philox")
    inputs = TrainingInput((None, purifier), Adversary(2 / 255, 1, "trades"), noise="philox")
    return classifier_fit(*args, **named, inputs=inputs)


def ddpm_fit(rows, valid, folder, steps=None, name="m", noise="numpy"):
    model = build_ddpm("tiny", 96, 0.3, 0)
    plan = DdpmRecipe(6, 4, 1e-3, 0.9, 0.3, 0, "fp32", noise)
    fit = DdpmFit(model, rows, valid, plan, work(folder, name), CPU, checkpoint_seconds=0, validate_every=3)
    return model, list(itertools.islice(fit.run(), steps))


def ddpm_fit_on_a_device(*args, **named):
    return ddpm_fit(*args, **named, noise="philox")  # the noise of a GPU


@pytest.fixture(scope="module")
def valid(test_x):
    return open_patches(test_x, selection=Selection(limit=8, shuffle_seed=0))


@pytest.mark.parametrize(
    "fit", [classifier_fit, dropout_fit, averaged_fit, adversarial_fit, ddpm_fit, ddpm_fit_on_a_device]
)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_fit_ends_in_the_same_weights(fit, stop, rows, valid, tmp_path):
    whole, records = fit(rows, valid, tmp_path, name="whole")
    fit(rows, valid, tmp_path, steps=stop)
    resumed, after = fit(rows, valid, tmp_path)
    assert after[0]["step"] == stop + 1
    assert after[-1]["step"] == records[-1]["step"]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [(tmp_path / f"{n}.part" / "training.jsonl").read_text() for n in ("whole", "m")]
    assert logs[0] == logs[1]


def test_the_average_of_the_weights_is_published(test_x, tmp_path):
    few = TrainingRows([open_patches(test_x, selection=Selection(limit=16))], labeled=True)
    published, records = classifier_fit(few, None, tmp_path, name="averaged", ema=0.75)
    steps = range(1, len(records) + 1)
    first, *others = (classifier_fit(few, None, tmp_path, steps=k, name=f"k{k}")[0].state_dict() for k in steps)
    for name, found in published.state_dict().items():
        if found.is_floating_point():
            expected = first[name]
            for state in others:
                expected = 0.75 * expected + 0.25 * state[name]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_only_noise_of_a_device_enters_the_recipe():
    plain, device = (DdpmRecipe(1, 4, 1e-3, 0.9, 0.3, 0, "fp32", noise).parameters() for noise in ("numpy", "philox"))
    assert device == plain | {"noise": "philox"}


def test_fits_of_one_process_may_differ_in_precision(rows, tmp_path):
    for precision in ("bf16", "fp32"):
        plan = DdpmRecipe(1, 4, 1e-3, 0.9, 0.3, 0, precision)
        model = build_ddpm("tiny", 96, 0.3, 0)
        (record,) = DdpmFit(model, rows, None, plan, work(tmp_path, precision), CPU).run()
        assert record["loss"] > 0


def test_a_fit_leaves_no_mixed_precision_behind(rows, tmp_path):
    model = build_ddpm("tiny", 96, 0.3, 0)
    plan = DdpmRecipe(1, 4, 1e-3, 0.9, 0.3, 0, "bf16")
    list(DdpmFit(model, rows, None, plan, work(tmp_path, "m"), CPU).run())
    x, t = torch.rand(1, 3, 96, 96), torch.zeros(1)
    other = copy.deepcopy(model.unet)
    with torch.no_grad():
        assert torch.equal(model(x, t), Ddpm(other, model.scheduler, model.card)(x, t))


def test_published_weights_are_the_ema(rows, tmp_path):
    """The fit ends in the moving average, recomputed here from the weights after each step."""
    model = build_ddpm("tiny", 96, 0.3, 0)
    plan = DdpmRecipe(6, 4, 1e-3, 0.9, 0.3, 0, "fp32")
    average = model.unet.conv_in.weight.detach().clone()
    for record in DdpmFit(model, rows, None, plan, work(tmp_path), CPU).run():
        raw = model.unet.conv_in.weight.detach().clone()
        decay = min(0.9, 1 - (1 + max(0, record["step"] - 1)) ** -0.75)  # diffusers' warm-up
        average += (1 - max(decay, 0)) * (raw - average)
    assert not torch.equal(raw, average)
    assert torch.allclose(model.unet.conv_in.weight, average, atol=1e-6)


def test_a_model_learns_in_its_own_range(rows, tmp_path):
    """On [0, 1] data the first loss is that of images as they are, noised."""
    losses = {}
    for name, data_range in (("centered", (-1.0, 1.0)), ("papers", (0.0, 1.0))):
        model = build_ddpm("tiny", 96, 0.3, 0, data_range)
        images, _ = next(rows.batches(0, 1, 4, 0))
        rng = stream(0, "augment", 0, 0)
        x_0 = random_symmetry(images, rng) * (data_range[1] - data_range[0]) + data_range[0]
        t, noise = (
            torch.from_numpy(rng.integers(0, 300, 4)),
            torch.from_numpy(rng.standard_normal(x_0.shape, np.float32)),
        )
        x_t = forward_process(x_0, noise, model.alpha_bar[t].view(-1, 1, 1, 1))
        expected = torch.nn.functional.mse_loss(model(x_t, t), noise).item()
        plan = DdpmRecipe(1, 4, 1e-3, 0.9, 0.3, 0, "fp32")
        (record,) = DdpmFit(model, rows, None, plan, work(tmp_path, name), CPU).run()
        losses[name] = record["loss"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert losses["centered"] != losses["papers"]


def test_looking_does_not_change_the_weights(rows, valid, tmp_path):
    one, _ = ddpm_fit(rows, valid, tmp_path, name="looked")
    two, _ = ddpm_fit(rows, None, tmp_path, name="blind")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert (tmp_path / "looked.part" / "samples.png").is_file()
    (first, last) = [
        json.loads(line) for line in (tmp_path / "looked.part" / "training.jsonl").read_text().splitlines()
    ]
    assert set(last["valid_loss"]) == {"0.02", "0.04", "0.085", "0.1", "0.15", "0.2", "0.3"}
    assert last["valid_loss"]["0.3"] < first["valid_loss"]["0.3"]


def test_order_belongs_to_seed_and_epoch(rows):
    def labels_and_sums(epoch, seed, skip=0):
        return [round(float(images.sum()), 2) for images, _ in rows.epoch(epoch, 8, seed, skip=skip)]

    assert labels_and_sums(0, 0) == labels_and_sums(0, 0)
    assert labels_and_sums(0, 0)[2:] == labels_and_sums(0, 0, skip=2)
    assert labels_and_sums(0, 0) != labels_and_sums(1, 0)
    assert labels_and_sums(0, 0) != labels_and_sums(0, 1)


def test_processes_share_each_batch(rows):
    whole = [images for images, _ in rows.epoch(0, 8, 0)]
    halves = [[images for images, _ in rows.epoch(0, 8, 0, part=(i, 2))] for i in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch, torch.cat([first, second]))


def test_a_set_named_twice_counts_twice(test_x):
    one = open_patches(test_x)
    rows = TrainingRows([one, one], labeled=True)
    assert len(rows) == 2 * len(one)
    images, _ = rows.read(np.array([0, len(one)]))
    assert torch.equal(images[0], images[1])


GPU = torch.device("cuda")  # of which only the name is used


@pytest.mark.parametrize("view", [View(), View(crop=64, pool=2)])
def test_a_gpu_finds_its_rows_in_memory(test_x, patches, monkeypatch, view):
    folder = open_patches(patches / "images" / "lossless_train").viewed(view)
    some = open_patches(test_x, selection=Selection(shuffle_seed=2)).viewed(view)
    sets = [some, folder, some]
    monkeypatch.setattr(loader, "free_memory", lambda _: 10**15)
    loaded = in_memory_for_gpu(sets, GPU)
    assert loaded[0] is loaded[2]
    files, memory = (TrainingRows(s, labeled=True) for s in (sets, loaded))
    chosen = np.array([3, len(some) + 2, 0, len(some) + len(folder) + 7])
    images, labels = files.read(chosen)
    for one in (some, folder):
        monkeypatch.setattr(one.source, "read", None)  # nothing is read again
    again, same = memory.read(chosen)
    assert torch.equal(again, images)
    assert torch.equal(same, labels)
    assert torch.equal(loaded[0].between(3, 8).read([0]), images[:1])


@pytest.mark.parametrize(("processes", "bytes_less", "fits"), [(1, 0, True), (1, 1, False), (2, 0, False)])
def test_sets_that_do_not_fit_are_read_from_files(test_x, monkeypatch, processes, bytes_less, fits):
    some = open_patches(test_x)
    needed = len(some) * some.source.read(np.arange(1)).nbytes
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    monkeypatch.setattr(loader, "free_memory", lambda _: 2 * (needed - bytes_less))
    assert (in_memory_for_gpu([some, some], GPU)[0] is some) == (not fits)
    assert in_memory_for_gpu([some], CPU) == [some]


def test_values_in_memory_are_checked(tmp_path):
    images = np.full((4, 3, 32, 32), 0.5, np.float32)
    images[2, 0, 0, 0] = np.nan
    save_file({"images": images}, tmp_path / "nan.safetensors")
    (loaded,) = in_memory_for_gpu([open_patches(tmp_path / "nan.safetensors")], GPU)
    with pytest.raises(AdvdiffError, match=r"row 2 of .* holds NaN"):
        loaded.read([1, 2])


def test_the_state_of_an_optimizer_is_laid_out_as_its_parameters():
    """A checkpoint has no layout, and fused steps on a GPU refuse one that is not that of the parameters."""

    def made():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
        network.to(memory_format=torch.channels_last)
        return network, torch.optim.AdamW(network.parameters(), 1e-3)

    with torch.random.fork_rng():
        (network, optimizer), (other, resumed) = made(), made()
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    saved = {k: v.contiguous() for k, v in optimizer_tensors(optimizer).items()}
    load_optimizer(resumed, saved)
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(resumed.state[q][name], optimizer.state[p][name])
            assert resumed.state[q][name].stride() == q.stride()
        assert resumed.state[q]["step"] == 1


def test_turns_are_the_eight_symmetries():
    image = torch.arange(9.0).view(1, 1, 3, 3).expand(400, 3, 3, 3)
    seen = {tuple(t[0].flatten().tolist()) for t in random_symmetry(image, np.random.default_rng(0))}
    assert len(seen) == 8
    wide = torch.rand(50, 3, 4, 6)
    assert random_symmetry(wide, np.random.default_rng(0)).shape == wide.shape


def test_stain_variation_keeps_the_range_and_does_nothing_at_0():
    images = torch.rand(20, 3, 8, 8).clamp(0.05, 1)
    assert torch.allclose(vary_stain(images, 0.0, np.random.default_rng(0)), images, atol=1e-4)
    varied = vary_stain(images, 0.2, np.random.default_rng(0))
    assert varied.min() >= 0
    assert varied.max() <= 1
    assert (varied - images).abs().mean() > 0.01


def test_learning_rate_rises_then_falls_to_nothing():
    rates = [cosine(step, 100, 1.0) for step in range(100)]
    assert rates.index(max(rates)) in (4, 5)
    assert max(rates) == 1.0
    assert rates[-1] < 0.001


def test_statistics(rows):
    mean, std = channel_statistics(rows, 0)
    images, _ = rows.read(np.arange(len(rows)))
    assert mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=1e-3)
    assert std == pytest.approx(images.std((0, 2, 3)).tolist(), abs=1e-3)


def test_statistics_of_a_constant_channel(tmp_path):
    images = np.random.default_rng(0).random((4, 3, 32, 32), np.float32)
    images[:, 2] = 0.3
    save_file({"images": images, "labels": np.array([0, 1, 0, 1])}, tmp_path / "blue.safetensors")
    _, std = channel_statistics(TrainingRows([open_patches(tmp_path / "blue.safetensors")], labeled=True), 0)
    assert std[2] == 1e-4 < std[0]


def test_work_of_another_recipe_is_not_taken_over(tmp_path):
    work(tmp_path)
    with pytest.raises(AdvdiffError, match="unfinished work of another recipe"):
        WorkFolder(OutputSpec(tmp_path / "m", recipe("test", {"seed": 1})), None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(AdvdiffError, match="is not a model folder of advdiff"):
        WorkFolder(OutputSpec(tmp_path / "other", recipe("test", {}), overwrite=True), None)


def test_trained_folders_work_end_to_end(advdiff, patches, tmp_path):
    train, valid = (patches / "pcam" / f"camelyonpatch_level_2_split_{s}_x.h5" for s in ("train", "valid"))
    out = tmp_path / "clf"
    command = ["train-classifier", train, "--valid", valid, "-o", out, "--arch", "shufflenet_v2_x0_5", "--epochs", 1]
    command += ["--batch-size", 16, "--precision", "fp32"]
    made = advdiff(*command, "--json").json
    assert [list(record)[:1] for record in made["log"]] == [["step"], ["step"]]
    judged = advdiff("evaluate", valid, "-c", out, "--json").json["sets"][0]
    assert made["published"]["valid_accuracy"]["value"] == judged["accuracy"]["value"]
    assert (
        "vit_b_16 does not take patches of 96x96"
        in advdiff(*command[:5], tmp_path / "v", "--arch", "vit_b_16", code=1).err
    )
    more = [*command[:5], tmp_path / "more", "--init", out, "--epochs", 1, "--batch-size", 16, "--precision", "fp32"]
    assert "give --arch shufflenet_v2_x0_5" in advdiff(*more, "--arch", "resnet18", code=1).err
    assert [p.name for p in tmp_path.iterdir()] == ["clf"]  # nothing was begun
    advdiff(*more)
    assert read_classifier(tmp_path / "more").config.arch == "shufflenet_v2_x0_5"
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "training.jsonl"]
    assert "up to date" in advdiff(*command).err
    assert "made with other settings (seed 0 -> 1)" in advdiff(*command, "--seed", 1, code=1).err
    assert advdiff("info", out, "--json").json["provenance"]["recipe"]["command"] == "train-classifier"
    second = ["train-ddpm", train, "-o", tmp_path / "ddpm", "--preset", "tiny", "--steps", 2, "--batch-size", 4]
    papers = [*second[:3], tmp_path / "papers", *second[4:], "--precision", "fp32"]
    advdiff(*papers, "--data-range", "0,1")
    card = read_ddpm(tmp_path / "papers").card
    assert card.data_range == (0.0, 1.0)
    assert (card.recommended.t_star, card.certification.t_star) == (0.2, 0.3)
    assert "trained on pixels in [0, 1]" in advdiff(*papers, "--overwrite", "--init", tmp_path / "papers", code=1).err
    second += ["--precision", "fp32", "--max-t", "0.2", "--init", tmp_path / "begun"]
    assert "no diffusion model is called" in advdiff(*second, code=1).err
    advdiff(*second[:-2])
    shutil.copytree(tmp_path / "ddpm", tmp_path / "begun")
    advdiff(*second, "--overwrite", "--valid", valid)
    assert advdiff("evaluate", patches / "images" / "test", "-c", out, "--json").json["sets"][0]["n"] > 0
    assert (tmp_path / "ddpm" / "samples.png").is_file()


def test_calibration_recovers_a_known_line():
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(40_000, generator=generator, dtype=torch.float64) * 3
    labels = (torch.rand(40_000, generator=generator, dtype=torch.float64) < torch.sigmoid(0.5 * odds + 1)).long()
    slope, bias = fit_platt(torch.stack([torch.zeros_like(odds), odds], 1), labels)
    assert slope == pytest.approx(0.5, abs=0.02)
    assert bias == pytest.approx(1, abs=0.04)


def test_a_calibrated_start_keeps_its_line_where_nothing_can_be_calibrated(test_x, valid, tmp_path, monkeypatch):
    """The weights are trained under it, so that without it every decision would move."""
    few, line = TrainingRows([open_patches(test_x, selection=Selection(limit=16))], labeled=True), (0.5, 0.8)
    for found, expected in (((1.0, 0.0), line), ((2.0, -1.0), (1.0, 0.6))):
        monkeypatch.setattr("advdiff_cli.training.fit_classifier.fit_platt", lambda *_, found=found: found)
        model, _ = classifier_fit(few, valid, tmp_path, name=str(found), line=line)
        assert (model.config.slope, model.config.bias) == expected


def test_calibration_leaves_alone_what_cannot_be_calibrated():
    odds = torch.tensor([-3.0, -2.0, 2.0, 3.0])
    logits = torch.stack([torch.zeros(4), odds], 1)
    assert fit_platt(logits, torch.tensor([1, 1, 1, 1])) == (1.0, 0.0)
    assert fit_platt(-logits, torch.tensor([0, 0, 1, 1])) == (1.0, 0.0)
    slope, _ = fit_platt(logits, torch.tensor([0, 0, 1, 1]))  # told apart without error: the slope stays finite
    assert 0 < slope < 5
