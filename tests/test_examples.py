"""The bash scripts that users copy, run on small data."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from advdiff_cli.data.patches import open_patches
from advdiff_cli.evaluation.predictions_csv import read_predictions
from advdiff_cli.models.card import PurificationSettings
from advdiff_cli.models.classifiers import read_classifier, save_classifier
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.models.registry import find_classifier, find_ddpm

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(warm):
    """Run a script with warm commands."""

    def run(script, *arguments, **settings):
        command = ["bash", str(EXAMPLES / script), *map(str, arguments)]
        return subprocess.run(command, env={**warm, **settings}, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_reproduce_paper(run, patches, tmp_path):
    small = {
        "EPOCHS": "1",
        "MORE_EPOCHS": "1",
        "STEPS": "2",
        "N": "6",
        "TEST_N": "8",
        "ADAPTIVE_N": "4",
        "DRAWS": "1",
        "TRAINING_STEPS": "1",
        "T_STARS": "0.02,0.05",
        "ADAPT_T_STARS": "0.1",
        "ATTACK_STEPS": "1",
        "ADAPTIVE_STEPS": "1",
        "EOT": "1",
        "QUERIES": "2",
        "NOISED": "synthetic-classifier",  # a model that is there already is not trained
        "ARCH": "shufflenet_v2_x0_5",
        "ROBUST_ARCH": "squeezenet1_1",
        "OTHER_ARCHS": "squeezenet1_1",
        "CLASSIFIER_OPTIONS": "--batch-size 16",
        "DDPM_OPTIONS": "--batch-size 4",
        "ADVERSARIAL_OPTIONS": "--attack-steps 1",
        "ATTACK_OPTIONS": "--batch-size 8",
    }
    done = run("reproduce_paper.sh", patches, tmp_path, **small)
    assert done.returncode == 0, done.stderr
    chosen = re.search(r"^chosen on valid: .* adapted (0\.\d+)$", done.stderr, re.M)[1]
    told = json.loads((tmp_path / "adapted-full.json").read_text())
    assert told["defense"]["t_star"] == float(chosen)
    assert [s["n"] for s in told["sets"]] == [4, 4]
    for name in ("undefended", "noise-blind", "paper", "robust-l2", "squeezenet1_1-ddpm"):
        assert re.search(rf"^{name} +\d+ +\d", done.stdout, re.M), name
    assert not (tmp_path / "noised").exists()
    assert "nuclear mass, ratio" in done.stdout
    points = json.loads((tmp_path / "sweep-training-0.2" / "sweep.json").read_text())["rows"]
    assert [p["value"] for p in points] == [1, 2]
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_purify_folder(run, patches, ddpm, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for file in sorted((patches / "images" / "test").rglob("*.jpg"))[:3]:
        (source / file.name).write_bytes(file.read_bytes())
    (source / "broken.png").write_bytes(b"no image")
    settings = ["-m", ddpm, "--t-star", "0.02", "--sampler-steps", "1"]
    done = run("purify_folder.sh", source, tmp_path / "out", *settings)
    assert done.returncode == 3
    assert done.stdout.strip() == str(tmp_path / "out")
    assert "broken.png: " in done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


@pytest.mark.slow
def test_shards(run, test_x, classifier, tmp_path, advdiff):
    options = "--steps 2 --limit 10 --batch-size 4"
    done = run("shards.sh", test_x, classifier, tmp_path / "adv.h5", 2, ATTACK_OPTIONS=options)
    assert done.returncode == 0, done.stderr
    advdiff("attack", test_x, "-c", classifier, "-o", tmp_path / "one.h5", *options.split())
    assert open_patches(tmp_path / "one.h5").fingerprint() == open_patches(tmp_path / "adv.h5").fingerprint()


@pytest.mark.slow
def test_other_attack_libraries(test_x, classifier, ddpm, tmp_path, advdiff):
    adv = tmp_path / "adv.safetensors"
    command = [sys.executable, str(EXAMPLES / "other_attack_libraries.py"), *map(str, (test_x, classifier, ddpm, adv))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # pyautoattack stops debuggers' tracing
    assert done.returncode == 0, done.stderr
    assert re.search(r"foolbox PGD-5 through the defense: accuracy [01]\.\d\d over 5 draws", done.stdout)
    assert re.search(r"pyautoattack on fixed noise: accuracy [01]\.\d\d", done.stdout)
    found = advdiff("evaluate", test_x, adv, "--limit", 4, "-c", classifier, "-m", ddpm, "--t-star", 0.04, "--json")
    assert [c["n"] for c in found.json["comparisons"]] == [4]
    assert "is not compared" not in found.err
    save_file({k: v for k, v in load_file(adv).items() if k != "origin_sha256"}, adv)
    found = advdiff("evaluate", test_x, adv, "--limit", 4, "-c", classifier, "-m", ddpm, "--t-star", 0.04, "--json")
    assert found.json["comparisons"] == []
    assert "is not compared with it" in found.err


@pytest.mark.slow
def test_slurm_array(run, test_x, classifier, tmp_path, advdiff):
    options = "--steps 2 --limit 10 --batch-size 4"
    for i in (1, 0):
        task = {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "2", "ATTACK_OPTIONS": options}
        done = run("slurm_array.sh", test_x, classifier, tmp_path / "parts", **task)
        assert done.returncode == 0, done.stderr
    advdiff("merge", *sorted((tmp_path / "parts").glob("*.h5")), "-o", tmp_path / "adv.h5")
    advdiff("attack", test_x, "-c", classifier, "-o", tmp_path / "one.h5", *options.split())
    assert open_patches(tmp_path / "one.h5").fingerprint() == open_patches(tmp_path / "adv.h5").fingerprint()
    assert "run it with sbatch" in run("slurm_array.sh", test_x, classifier, tmp_path / "parts").stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is not installed")
def test_parallel(run, patches, ddpm, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for file in sorted((patches / "images" / "test").rglob("*.jpg"))[:5]:
        (source / file.name).write_bytes(file.read_bytes())
    done = run("parallel.sh", source, tmp_path / "out", 2, "-m", ddpm, "--t-star", "0.02", "--sampler-steps", "1")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    assert [p.name for p in (tmp_path / "out").glob("*.jsonl")] == ["advdiff.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("snakemake"), reason="Snakemake is not installed")
def test_snakemake(warm, test_x, classifier, ddpm, tmp_path):
    config = [f"data={test_x}", f"classifier={classifier}", f"ddpm={ddpm}", f"out={tmp_path / 'out'}", "shards=2"]
    config += ["attack_options=--limit 8 --steps 2 --batch-size 4", "purify_options=--t-star 0.02 --sampler-steps 1"]
    command = ["snakemake", "-s", str(EXAMPLES / "Snakefile"), "--cores", "2", "--config", *config]
    done = subprocess.run(command, env=warm, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sets = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]
    assert [s["n"] for s in sets] == [8, 8]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("dvc") and shutil.which("git")), reason="DVC is not installed")
def test_dvc(warm, test_x, classifier, ddpm, tmp_path):
    shutil.copytree(EXAMPLES / "dvc", tmp_path, dirs_exist_ok=True)
    shutil.copy(test_x, tmp_path / "test_x.h5")
    shutil.copy(str(test_x).replace("_x.h5", "_y.h5"), tmp_path / "test_y.h5")
    params = {"data": "test_x.h5", "classifier": str(classifier), "ddpm": str(ddpm), "eps": "2/255", "limit": 6}

    def repro(**changed):
        (tmp_path / "params.yaml").write_text(json.dumps({**params, "attack_steps": 1, **changed}))
        done = subprocess.run(["dvc", "repro"], env=warm, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads((tmp_path / "evaluation.json").read_text())["sets"][0]

    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, env=warm, cwd=tmp_path, check=True)
    assert repro()["n"] == 6
    assert repro(attack_steps=2)["history"][0]["parameters"]["steps"] == 2


def example(name):
    """Return a script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_batchnorm_collapse():
    """What the paper's training moves, and what it does not."""
    collapse = example("batchnorm_collapse")
    images, labels = torch.rand(4, 3, 96, 96), torch.tensor([0, 1, 0, 1])
    classifier = find_classifier("synthetic-classifier")
    before = read_classifier(classifier).state_dict()
    for batch, rate, update in collapse.VARIANTS.values():
        model = read_classifier(classifier)
        collapse.train(model, images, labels, batch, rate, update=update)
        moved = {
            k for k, v in model.state_dict().items() if v.is_floating_point() and (v - before[k]).abs().max() > 1e-7
        }
        assert any("running" in k for k in moved) == update
        assert any("running" not in k for k in moved) == (rate > 1e-6)
    clean, attacked = collapse.judge(model, images, labels)
    assert clean.value >= attacked.value


def test_weight_interpolation(test_x, tmp_path):
    """Weights on the line between two classifiers; at its end the decisions of the second, calibrated."""
    second = read_classifier(find_classifier("synthetic-classifier"))
    with torch.no_grad():
        for weights in second.parameters():
            weights.mul_(1.01)
    save_classifier(second, tmp_path / "second", {})
    interpolate = example("weight_interpolation").main
    settings = {"ddpm": "synthetic-ddpm", "t_star": 0.06}
    for weight in (0.25, 1.0):
        interpolate(
            "synthetic-classifier", str(tmp_path / "second"), str(test_x), tmp_path / f"{weight}", weight, **settings
        )
    states = [read_classifier(tmp_path / f"{weight}").state_dict() for weight in (0.25, 1.0)]
    before = read_classifier(find_classifier("synthetic-classifier")).state_dict()
    for name, end in second.state_dict().items():
        assert torch.equal(states[1][name], end)
        if end.is_floating_point():
            assert torch.allclose(states[0][name], 0.75 * before[name] + 0.25 * end, atol=1e-6)
    images = open_patches(test_x).batch(range(8), "cpu").images
    last, raw = read_classifier(tmp_path / "1.0"), second.backbone((images - second.mean) / second.std)
    line = raw.diff(dim=1)[:, 0] * last.config.slope + last.config.bias
    assert torch.allclose(last(images).diff(dim=1)[:, 0], line, atol=1e-4)
    with pytest.raises(typer.BadParameter, match="exists"):
        interpolate("synthetic-classifier", "synthetic-classifier", str(test_x), tmp_path / "1.0")


def test_classifier_mixture(test_x, tmp_path, advdiff):
    """The mean of two probabilities on the draws of `evaluate`; the attack lowers that of the true class."""
    mixture, out = example("classifier_mixture"), tmp_path / "mixture"
    settings = {"robust": "synthetic-classifier", "ddpm": "synthetic-ddpm", "t_star": 0.06, "weight": 0.25}
    for _ in range(2):  # the second time, from the batches of the first one
        mixture.main(str(test_x), out, "synthetic-classifier", **settings, steps=2, limit=6, batch_size=4)
    clean, attacked = (s.predictions for s in read_predictions(out / "predictions.csv"))
    with pytest.raises(typer.BadParameter, match="other settings"):
        mixture.main(
            str(test_x), out, "synthetic-classifier", **settings | {"weight": 0.5}, steps=2, limit=6, batch_size=4
        )

    few = ["--shuffle-seed", 0, "--limit", 6, "-c", "synthetic-classifier"]

    def evaluate(name, *options):
        fp32 = ["--precision", "fp32"]  # as the mixture computes on every machine
        advdiff("evaluate", test_x, *few, *fp32, "--predictions", tmp_path / name, *options)
        return read_predictions(tmp_path / name)[0].predictions.p1

    advdiff("attack", test_x, *few, "--steps", 2, "-o", tmp_path / "adv.h5")
    alone = evaluate("alone.csv", tmp_path / "adv.h5")
    purified = evaluate("purified.csv", "-m", "synthetic-ddpm", "--t-star", 0.06, "--sampler-steps", 1, "--draws", 11)
    assert clean.p1 == pytest.approx(0.25 * purified + 0.75 * alone, abs=1e-5)
    sign = 2 * clean.labels[:, None] - 1
    assert (sign * attacked.p1).mean() < (sign * clean.p1).mean()
    compared = json.loads(advdiff("compare", tmp_path / "alone.csv", out / "predictions.csv", "--json").out)
    assert [c["n"] for c in compared["comparisons"]] == [6, 6]


@pytest.mark.parametrize("classifier", [None, "synthetic-classifier"])
def test_one_step_purifier(test_x, tmp_path, classifier):
    """A diffusion model of the same form, whose weights have moved, and which says so."""
    before = read_ddpm(find_ddpm("synthetic-ddpm"))
    options = {"classifier": classifier, "steps": 2, "batch_size": 2}
    example("one_step_purifier").main("synthetic-ddpm", [str(test_x)], tmp_path / "d", **options)
    after = read_ddpm(tmp_path / "d")
    moved = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-2
    settings = PurificationSettings(0.2, sampler_steps=1)
    made = after.card.provenance["recipe"]
    assert (made["command"], made["parameters"]["steps"]) == ("one_step_purifier.py", 2)
    assert made["init"] == folder_fingerprint(find_ddpm("synthetic-ddpm"))
    assert (made["classifier"] is None) == (classifier is None)
    assert after.card == replace(before.card, recommended=settings, provenance=after.card.provenance)
