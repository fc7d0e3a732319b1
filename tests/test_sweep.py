"""Sweeps: a point is what the other commands make of the same setting, and the rule is the one declared."""

import csv
import json
import shutil

import numpy as np
import pytest
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from advdiff_cli.attacks.spec import DEFAULTS, AttackRequest
from advdiff_cli.cli.compute_options import ComputeOptions
from advdiff_cli.data.patches import open_patches
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.models.ddpm import Ddpm, read_ddpm, save_ddpm
from advdiff_cli.robustness.sweep import Criterion, JudgedPoint

N = 16


@pytest.fixture(scope="module")
def common(test_x, classifier, ddpm):
    return ["sweep", test_x, "-c", classifier, "-m", ddpm, "--limit", N, "--precision", "fp32"]


def judged(clean, robust, n=400):
    """Predictions of the given accuracies, nested: what a worse point gets right, a better one does too."""
    labels = np.ones(n, np.int64)
    return JudgedPoint(*(Predictions(labels, (np.arange(n) < round(a * n)).astype(float)) for a in (clean, robust)))


def test_rules():
    points = [judged(0.9, 0.4), judged(0.88, 0.7), judged(0.8, 0.76), judged(0.7, 0.77)]
    undefended = judged(0.9, 0.1).clean
    assert Criterion("mean").choose(points, undefended) == 1
    assert Criterion("robust").choose(points, undefended) == 2  # 0.76 is 4 patches of 400 from the best, 0.70 is 28
    assert Criterion("mean").choose([judged(0.9, 0.5), judged(0.9, 0.5)], undefended) == 0
    assert Criterion("robust").choose([judged(0.9, 0.5), judged(0.9, 0.5)], undefended) == 0


def test_a_point_that_costs_too_much_is_not_chosen():
    points = [judged(0.6, 0.6), judged(0.88, 0.7), judged(0.8, 0.76), judged(0.7, 0.77)]
    undefended = judged(0.9, 0.1).clean
    assert Criterion("robust", 0.1).choose(points, undefended) == 2  # at the limit
    assert Criterion("robust", 0.09).choose(points, undefended) == 1
    assert Criterion("mean", 0.01).choose(points, undefended) is None
    assert "drops by 3 points or less" in Criterion("robust", 0.03).describe()


def test_a_point_is_what_the_other_commands_make_of_it(advdiff, common, test_x, classifier, ddpm, tmp_path):
    run = [*common, "--values", "0.2,0.02", "--steps", 2, "--sampler-steps", 1, "--draws", 3, "-o", tmp_path / "s"]
    found = advdiff(*run, "--json").json
    assert [r["value"] for r in found["rows"]] == [0.02, 0.2]
    rows = ["--limit", N, "--shuffle-seed", 0]
    attack = ["attack", test_x, *rows, "-c", classifier, "--steps", 2, "-o", tmp_path / "s" / "adv.safetensors"]
    assert "up to date" in advdiff(*attack).err
    evaluate = ["evaluate", test_x, tmp_path / "s" / "adv.safetensors", *rows, "-c", classifier]
    plain = advdiff(*evaluate, "--json").json["sets"]
    assert found["undefended"]["value"] == plain[0]["accuracy"]["value"]
    for row in found["rows"]:
        defense = ["-m", ddpm, "--t-star", row["value"], "--sampler-steps", 1, "--draws", 3, "--precision", "fp32"]
        clean, adv = advdiff(*evaluate, *defense, "--json").json["sets"]
        assert (row["standard"], row["robust"]) == (clean["accuracy"], adv["accuracy"])
        assert row["undefended_robust"]["value"] == plain[1]["accuracy"]["value"]
        assert row["unet_evaluations"] == 1
    with (tmp_path / "s" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["robust"]) for r in table] == pytest.approx([r["robust"]["value"] for r in found["rows"]])


def test_files_of_others_are_kept(advdiff, common, tmp_path):
    run = [*common, "--values", "0.1", "--steps", 1, "--sampler-steps", 1, "--draws", 1, "-o", tmp_path / "s"]
    (tmp_path / "s").mkdir()
    for name in ("sweep.json", "sweep.png"):
        (tmp_path / "s" / name).write_text("{}")
        assert f"{name} exists and was not made by this command" in advdiff(*run, code=1).err
        assert [p.read_text() for p in (tmp_path / "s").iterdir()] == ["{}"]
        (tmp_path / "s" / name).unlink()
    advdiff(*run)
    advdiff(*run)
    (tmp_path / "s" / "sweep.csv").write_text("mine")
    assert "sweep.csv exists and was not made by this command" in advdiff(*run, code=1).err
    advdiff(*run, "--overwrite")
    (tmp_path / "s" / "sweep.advdiff").unlink()  # an earlier version, or a process that was killed
    advdiff(*run)


def test_a_sweep_is_made_once_and_drawn_alike(advdiff, common, tmp_path):
    run = [*common, "--values", "0.1", "--steps", 1, "--sampler-steps", 1, "-o", tmp_path / "s"]
    first = advdiff(*run, "-q").out
    names = ("sweep.svg", "sweep.png", "sweep.json", "adv.safetensors", "t-star-0.1-clean.predictions.safetensors")
    made = {name: (tmp_path / "s" / name).read_bytes() for name in names}
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*.safetensors")}
    assert advdiff(*run, "-q").out == first == "0.1\n"
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*.safetensors")} == stamps
    assert all((tmp_path / "s" / name).read_bytes() == content for name, content in made.items())
    limited = advdiff(*run, "--max-drop", 0, "--json").json
    costs = limited["rows"][0]["standard"]["value"] < limited["undefended"]["value"]
    assert limited["chosen_told"] == (None if costs else "0.1")
    assert f"chosen {'none' if costs else '0.1'} (mean: " in advdiff(*run, "--max-drop", 0).out
    more = advdiff(*run, "--values", "0.05,0.1", "--json").json  # another point costs that point alone
    assert len(more["rows"]) == 2
    assert (tmp_path / "s" / "adv.safetensors").stat().st_mtime_ns == stamps["adv.safetensors"]
    assert "made with other settings" in advdiff(*run, "--eps", "4/255", code=1).err
    assert "would sweep t-star-0.1" in advdiff(*run, "--dry-run").out


def test_steps_are_limited_by_the_timesteps_of_the_model(advdiff, common, ddpm, tmp_path):
    """t* 0.1 of T = 100 has 10 noise levels, of T = 1000 it has 100."""
    model = read_ddpm(ddpm)
    save_ddpm(Ddpm(model.unet, DDPMScheduler(num_train_timesteps=100), model.card), tmp_path / "short")
    sweep = [*common, "-m", tmp_path / "short", *"--limit 2 --values 0.1,0.3 --sampler-steps 20 --steps 1".split()]
    found = advdiff(*sweep, "--draws", 1, "-o", tmp_path / "s", "--json").json
    assert [row["unet_evaluations"] for row in found["rows"]] == [10, 20]


def test_over_eps_steps_and_adaptive(advdiff, common, tmp_path):
    common = [*common, "--draws", 1, "--batch-size", 8]
    over_eps = [*common, "--over", "eps", "--steps", 2, "--sampler-steps", 1, "--json"]
    eps = advdiff(*over_eps, "--values", "1/255,8/255", "-o", tmp_path / "e").json
    assert [r["value"] for r in eps["rows"]] == pytest.approx([1, 8])
    assert (eps["chosen"], eps["attack_told"]) == (None, "pgd linf, steps 2, loss ce, gradient blind")
    assert eps["rows"][0]["undefended_robust"]["value"] >= eps["rows"][1]["undefended_robust"]["value"]
    l2 = advdiff(*over_eps, "--norm", "l2", "--values", "0.5,2", "-o", tmp_path / "l").json
    assert [r["name"] for r in l2["rows"]] == ["eps-0.5", "eps-2"]
    attacked = load_file(tmp_path / "l" / "adv-eps-2.safetensors")
    moved = attacked["images"] - open_patches(str(common[1])).read(attacked["index"].tolist())
    assert moved.flatten(1).norm(dim=1).max().item() == pytest.approx(2, abs=0.01)
    steps = ["--over", "sampler-steps", "--values", "1,3", "--t-star", "0.1", "--steps", 1, "--gradient", "full"]
    found = advdiff(*common, *steps, "--eot", 1, "-o", tmp_path / "k", "--json").json
    assert [r["unet_evaluations"] for r in found["rows"]] == [1, 3]
    assert found["rows"][0]["undefended_robust"] is None
    assert (tmp_path / "k" / "adv-sampler-steps-3.safetensors").is_file()
    noise = [*common[:4], *common[6:], "--defense", "noise", "--values", "0.05", "--steps", 1, "-o", tmp_path / "n"]
    assert advdiff(*noise, "--json").json["rows"][0]["unet_evaluations"] == 0


def test_square_through_a_defense_and_steps_that_low_levels_have_not(advdiff, common, tmp_path, monkeypatch):
    square = ["--method", "square", "--gradient", "full", "--eot", 1, "--sampler-steps", 3, "--values", "0.002,0.05"]
    dry = advdiff(*common, *square, "-o", tmp_path / "q", "--dry-run", "--json").json
    assert dry["points"] == ["t-star-0.002", "t-star-0.05"]
    monkeypatch.setitem(DEFAULTS, "square", AttackRequest(loss="margin", queries=2, restarts=1))
    run = [*common, *square[:-1], "0.05", "--limit", 2, "--draws", 1, "-o", tmp_path / "s", "--json"]
    found = advdiff(*run).json
    assert "gradient" not in found["attack_told"]
    assert "eot 1" in found["attack_told"]


def test_a_sweep_goes_on_at_its_own_precision_and_batch_size(advdiff, common, tmp_path):
    run = [*common, "--values", "0.1", "--steps", 1, "--sampler-steps", 1, "-o", tmp_path / "s"]
    advdiff(*run, "--batch-size", 8)
    told = advdiff(*run[:-6], *run[-6:], "--json").json["recipe"]["parameters"]
    assert (told["batch_size"], told["precision"]) == (8, "fp32")
    auto = [a for a in run if a not in ("--precision", "fp32")]
    assert advdiff(*auto, "--json").json["recipe"]["parameters"]["precision"] == "fp32"


def test_a_blind_attack_does_not_tell_the_precision_of_the_purifier(advdiff, common, tmp_path, monkeypatch):
    run = [a for a in common if a not in ("--precision", "fp32")]
    run += [*"--limit 4 --values 0.1 --steps 1 --sampler-steps 1 --draws 1 --json -o".split(), tmp_path / "s"]

    def best(asked, device):
        return "bf16" if asked == "auto" else asked

    monkeypatch.setattr("advdiff_cli.models.device.resolve_precision", best)
    whole = advdiff(*run).json
    for path in tmp_path.glob("s/*"):
        if not path.name.startswith("adv"):
            path.unlink()  # it was stopped before anything was judged
    assert list(tmp_path.glob("s/adv*"))
    assert advdiff(*run).json["recipe"] == whole["recipe"]
    assert whole["recipe"]["parameters"]["precision"] == "bf16"


def test_an_adaptive_sweep_goes_on_with_its_own_noise_and_overwrite_begins_anew(
    device, advdiff, common, tmp_path, monkeypatch
):
    run = [*common, *"--limit 4 --values 0.1 --steps 1 --sampler-steps 1 --gradient full --eot 1".split()]
    run += ["-o", tmp_path / "s", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(ComputeOptions, "noise_kind", lambda *_: "philox")  # as on a GPU
        advdiff(*run, "--draws", 1)
    for path in tmp_path.glob("s/*"):
        if not path.name.startswith("adv-"):
            path.unlink()  # it was stopped before anything was judged
    (made,) = tmp_path.glob("s/*")
    stamp = made.stat().st_mtime_ns
    assert advdiff(*run, "--draws", 1).json["defense"]["noise"] == "philox"
    assert made.stat().st_mtime_ns == stamp
    assert advdiff(*run).json["draws"] == 1
    anew = advdiff(*run, "--overwrite").json
    assert anew["draws"] == 11
    assert anew["defense"].get("noise", "numpy") == {"cpu": "numpy", "cuda": "philox"}[device.type]


def test_a_purifier_of_another_view_is_refused(advdiff, common, classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "pooled")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pool": 2}))
    words = [*common, "-c", folder, "--values", "0.1", "-o", tmp_path / "s"]
    assert "cannot purify" in advdiff(*words, "--dry-run", code=1).err


def test_values_that_make_no_sense(advdiff, common, ddpm, tmp_path):
    out = ["-o", tmp_path / "s"]
    for wrong, says in (
        (["--values", "0.1,x"], "'x' is not a number"),
        (["--values", "0.1,0.1"], "t-star-0.1 is repeated"),
        (["--values", "0.5"], "above max_t"),
        (["--values", "0"], "0 is not a valid t-star"),
        (["--over", "sampler-steps", "--values", "1.5"], "1.5 is not a valid sampler-steps"),
        (["--values", "nan"], "nan is not a valid t-star"),
        (["--eot", 4], "--eot needs an attack through the defense"),
        (["--method", "square", "--gradient", "bpda"], "--method square takes no gradient"),
        (["--over", "eps", "--max-drop", "3"], "leave out --max-drop"),
        (["--over", "eps", "--eps", "1/255"], "takes its values from --values; leave out --eps"),
        (["--t-star", "0.1"], "takes its values from --values; leave out --t-star"),
    ):
        assert says in advdiff(*common, *wrong, *out, code=1).err
    models = [*common[:4], *common[6:], "--over", "ddpm"]
    assert "--over ddpm needs --values" in advdiff(*models, *out, code=1).err
    assert "does not record its training steps" in advdiff(*models, "--values", ddpm, *out, code=1).err
    assert "leave out -m" in advdiff(*common, "--over", "ddpm", "--values", ddpm, *out, code=1).err
    assert not (tmp_path / "s").exists()


def test_certified_accuracy_chooses(advdiff, test_x, classifier, tmp_path):
    out = tmp_path / "sweep"
    base = ["sweep", test_x, "-c", classifier, "--defense", "noise", "--limit", 6, "--steps", 1, "--draws", 1]
    base += ["--rule", "certified", "-o", out]
    found = advdiff(*base, "--values", "0.02,0.2", "--eps", "0.2/255", "--json").json
    proved = [row["certified"]["value"] for row in found["rows"]]
    assert found["chosen_value"] == found["rows"][proved.index(max(proved))]["value"]
    assert (out / "t-star-0.2-certified.csv").is_file()
    header = (out / "sweep.csv").read_text().splitlines()[0]
    assert header.endswith("certified,certified_low,certified_high")
    assert "certified %" in advdiff(*base, "--values", "0.02,0.2", "--eps", "0.2/255").out
    assert "leave out --over eps" in advdiff(*base, "--norm", "l2", "--eps", 1, code=1).err
