"""`advdiff robustness` and `advdiff evaluate -m`: the whole suite on a small set, resumed, judged on shared draws."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import pytest

from advdiff_cli.attacks.spec import AttackRequest, resolve
from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.evaluation.predictions_csv import read_predictions
from advdiff_cli.jobs.attack import AttackJob
from advdiff_cli.jobs.result_cache import cached_result
from advdiff_cli.purification.defense import Defense, EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec
from advdiff_cli.robustness import suite
from advdiff_cli.robustness.suite import Budget
from advdiff_cli.robustness.timing_log import TimingLog, journal_path, recorded_seconds

N, B = 4, 2


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(suite.PRESETS, "quick", Budget(patches=N, steps=2, eot=2, queries=2, draws=3))


@pytest.fixture
def defended(classifier, ddpm):
    return ["-c", classifier, "-m", ddpm, *"--t-star 0.03 --sampler-steps 1".split(), "--batch-size", B]


@pytest.fixture
def command(test_x, defended):
    return ["robustness", test_x, *defended, *"--preset quick --precision fp32".split()]


def timeless(result):
    assert all(r["seconds"] >= 0 for r in result["rungs"])
    return {**result, "out": "", "rungs": [{**r, "seconds": 0} for r in result["rungs"]]}


@pytest.mark.slow
def test_the_whole_suite(advdiff, command, tmp_path):
    out, command = tmp_path / "suite", [*command, "--batch-size", N]
    plan = advdiff(*command, "-o", out, "--dry-run", "--json").json
    assert not out.exists()
    *names, certified, gradients, unit_test = (r["name"] for r in plan["rungs"])
    assert (certified, gradients, unit_test) == ("certified", "gradients", "unit-test")
    assert {"clean", "blind", "bpda", "pgd", "apgd-margin", "square", "transfer", "fixed-noise", "eps-64"} <= set(names)
    assert next(r for r in plan["rungs"] if r["name"] == "pgd")["unet_backward"] == 2 * 2  # two steps of two draws

    result = advdiff(*command, "-o", out, "--json").json
    json.dumps(result, allow_nan=False)
    assert [r["name"] for r in result["rungs"]] == names
    assert json.loads((out / "robustness.json").read_text()) == result
    clean, worst = read_predictions(out / "predictions.csv")
    assert worst.name == "worst linf 2/255"
    assert [clean.predictions.share.mean(), worst.predictions.share.mean()] == pytest.approx(
        [result["rungs"][0]["accuracy"]["value"], result["worst"]["accuracy"]["value"]]
    )
    again = shutil.copy(out / "predictions.csv", tmp_path / "again.csv")
    compared = advdiff("compare", out / "predictions.csv", again, "--json")
    assert [c["difference"]["value"] for c in compared.json["comparisons"]] == [0, 0]
    for r in result["rungs"]:
        assert r["clean"]["value"] == pytest.approx(result["rungs"][0]["accuracy"]["value"]) or r["draws"] == 1
        if r["name"] in result["worst"]["of"]:
            assert result["worst"]["accuracy"]["value"] <= r["accuracy"]["value"]
    assert result["recipe"]["parameters"]["seed"] == 0

    proved = result["certified"]
    assert (proved["norm"], proved["eps"], proved["n"]) == ("linf", 2 / 255, N)
    checks = [a["name"] for a in result["alarms"]]
    assert ("no attack breaks a certificate" in checks) == (proved["value"] > 0)
    again = advdiff(*command, "-o", out, "--overwrite", "--json").json
    assert again == result  # the seconds too: nothing was done again
    (out / "pgd.safetensors").unlink()
    (out / "bpda.predictions.safetensors").unlink()
    (out / "unit-test.json").unlink()
    assert timeless(advdiff(*command, "-o", out, "--json").json) == timeless(result)
    assert "eps" in advdiff(*command, "-o", out, "--eps", "4/255", code=1).err
    bf16 = advdiff(*command, "-o", out, "--precision", "bf16", code=1).err
    assert "clean.predictions.safetensors was made with other settings (precision" in bf16
    text = advdiff(*command, "-o", out).out
    assert "keep its example" in text
    assert "accuracy" not in advdiff(*command, "-o", out, "-q").err
    assert "worst" in text
    assert "all draws correct" in text
    assert "lies between" in text


def test_a_row_is_what_the_attack_command_makes(advdiff, command, test_x, defended, tmp_path):
    out = tmp_path / "suite"
    advdiff(*command, "-o", out, "--only", "pgd", "-q")
    assert sorted(p.name for p in out.iterdir()) == [
        "clean.predictions.safetensors",
        "pgd.predictions.safetensors",
        "pgd.safetensors",
        "seconds.jsonl",
    ]
    attack = ["attack", test_x, *defended, *f"--steps 2 --eot 2 --momentum 1 --shuffle-seed 0 --limit {N}".split()]
    attack += ["-o", out / "pgd.safetensors"]
    assert "up to date" in advdiff(*attack).err  # at the precision it was begun with
    assert "precision" in advdiff(*attack, "--precision", "bf16", code=1).err
    assert "gradients underflow" in advdiff(*command, "-o", out, "--precision", "fp16", code=1).err
    words = [w for w in command if w not in ("--precision", "fp32", "--batch-size", B)]
    again = advdiff(*words, "-o", out, "--only", "pgd", "--json").json  # precision and batch size of what is there
    assert (again["recipe"]["parameters"]["precision"], again["recipe"]["parameters"]["batch_size"]) == ("fp32", B)
    assert "--only nonsense: there is no such row" in advdiff(*command, "-o", out, "--only", "nonsense", code=1).err


def test_shards_of_a_suite_in_one_folder(advdiff, test_x, classifier, tmp_path):
    command = ["robustness", test_x, "-c", classifier, "--defense", "noise", "--t-star", "0.1", "--preset", "quick"]
    command += ["--limit", N, "--batch-size", 2, "--only", "fgsm", "--json"]
    alone = advdiff(*command, "-o", tmp_path / "one").json
    two = [*command, "-o", tmp_path / "two"]
    assert advdiff(*two, "--shard", "1/2").json["shard"] == [1, 2]
    told = advdiff(*two, code=1).err
    assert "fgsm.safetensors: --shard 0/2 not finished with these settings" in told
    advdiff(*two, "--shard", "0/2")
    assert timeless(advdiff(*two).json) | {"out": ""} == timeless(alone) | {"out": ""}
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if "of2" not in p.name) == names
    assert [p.name for p in (tmp_path / "two").glob("*of2*.safetensors")] == []
    assert advdiff(*two, "--shard", "0/2").json["status"] == "done"  # it is part of the whole
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if "of2" not in p.name) == names
    other = advdiff(*two, "--shard", "0/2", "--seed", 1, code=1).err
    assert "was made with other settings (seed" in other
    advdiff(*two[:-2], "-o", tmp_path / "three", "--shard", "0/2", "--seed", 1)
    advdiff(*two[:-2], "-o", tmp_path / "three", "--shard", "1/2")
    assert "--shard 0/2 not finished" in advdiff(*two[:-2], "-o", tmp_path / "three", code=1).err


def test_precision_of_attack_and_judging(advdiff, test_x, classifier, ddpm, tmp_path):
    defense = ["-m", ddpm, "--t-star", "0.03", "--sampler-steps", 1]
    attack = ["attack", test_x, "--limit", 2, "-c", classifier, *defense, "--steps", 1, "--batch-size", 2]
    blind = advdiff(*attack, "--gradient", "blind", "--precision", "bf16", "-o", tmp_path / "a.h5", "--json").json
    assert (blind["parameters"]["precision"], blind["precision"]) == ("fp32", "bf16")
    words = ["--gradient", "full", "--eot", 1, "--overwrite", "--precision", "bf16", "-o", tmp_path / "a.h5"]
    assert advdiff(*attack, *words, "--json").json["parameters"]["precision"] == "bf16"
    judge = ["evaluate", test_x, tmp_path / "a.h5", "--limit", 2, "-c", classifier, *defense, "--draws", 1]
    assert "in bf16, and is judged in fp32" in advdiff(*judge, "--precision", "fp32").err
    assert "is judged" not in advdiff(*judge, "--precision", "bf16").err


def test_what_an_evaluation_does_not_show_is_told(advdiff, test_x, classifier, ddpm, tmp_path):
    adv, fixed, rows, exact = tmp_path / "a.h5", tmp_path / "f.h5", ["--limit", 2], ["--precision", "fp32"]
    defense = ["-m", ddpm, "--t-star", "0.03", "--sampler-steps", 1]
    attack = ["attack", test_x, *rows, "-c", classifier, *defense, "--steps", 1, *exact, "--batch-size", 2, "-q"]
    advdiff(*attack, "--eot", 1, "-o", adv)
    advdiff(*attack, "--fixed-draw", "--seed", 3, "-o", fixed)

    def told(*sets, of=defense, seed=0):
        judge = ["evaluate", test_x, *sets, *rows, "-c", classifier, *of, *exact, "--seed", seed]
        return advdiff(*judge, *(["--draws", 1] if of else []))

    sound = told(adv)
    assert "another model" not in sound.err
    assert "(pgd linf 2/255, steps 1, loss ce, gradient full, eot 1) through (defense ddpm, t_star 0.03" in sound.out
    assert "another model (t_star): a transferred attack is weaker" in told(adv, of=[*defense, "--t-star", "0.04"]).err
    for steps, judged in ((10, 1), (None, 1)):
        through, judge = (DefenseSpec("ddpm", 0.25, "ddpm", n) for n in (steps, judged))
        assert through.differences(judge) == judge.differences(through) == ["sampler_steps"]
    assert "another model (defense, t_star, diffusion model)" in told(adv, of=["--defense", "noise"]).err
    assert "is judged without it" in told(adv, of=[]).err
    assert "on a draw of --seed 3, which is none of these draws" in told(fixed).err
    assert "look at the vote of 1" in told(fixed, seed=3).err
    advdiff("purify", adv, *defense, "-o", tmp_path / "p.h5", "-q")
    assert "was purified before" in told(tmp_path / "p.h5").err
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"bias": 0.5}))
    judged = advdiff("evaluate", test_x, adv, *rows, "-c", other, *defense, "--draws", 1)
    assert "another model (classifier)" in judged.err


def test_seconds_add_up_over_runs_and_processes(tmp_path):
    first, second = (journal_path(tmp_path, i, 2) for i in range(2))
    watches = [TimingLog(first, {"a": 1}, restart=anew) for anew in (True, True, False)]
    for watch in watches:
        with watch:
            time.sleep(0.02)
    with first.open("a") as file:
        file.write('{"of": "half a li')
    with TimingLog(first, {"a": 2}):
        pass
    laps = [json.loads(line)["seconds"] for line in first.read_text().splitlines()]
    shared = laps[1] + laps[2]  # what came before it was begun anew is forgotten
    assert recorded_seconds(tmp_path, {"a": 1}) == pytest.approx(shared)
    assert min(laps[:3]) > 0.01
    with TimingLog(second, {"a": 1}, restart=True):
        time.sleep(0.02)
    both = shared + json.loads(second.read_text())["seconds"]
    assert recorded_seconds(tmp_path, {"a": 1}) == pytest.approx(both)


def test_undefended(advdiff, test_x, classifier, tmp_path):
    base = ["robustness", test_x, "-c", classifier, "--preset", "quick", "--batch-size", B, "-o", tmp_path / "suite"]
    result = advdiff(*base, "--json").json
    assert result["defense"] is None
    assert result["draws"] == 1
    assert "bpda" not in {r["name"] for r in result["rungs"]}
    assert all("vote_5" not in r for r in result["rungs"])


def test_killed_in_a_row_it_ends_the_same(advdiff, command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*command, "--only", "pgd", "--only", "blind"]
    expected = advdiff(*words, "-o", whole, "--json").json
    code = (
        "from advdiff_cli.data import patch_writer; from advdiff_cli.robustness import suite\n"
        "from advdiff_cli.main import main; patch_writer._FLUSH_SECONDS = 0\n"
        f"suite.PRESETS['quick'] = suite.Budget({N}, 2, 2, 2, 3)\n"
        "main()"
    )
    run = [sys.executable, "-c", code, *map(str, words), "-o", str(killed)]
    rows = killed / "pgd.safetensors.part.rows"
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (rows.exists() and rows.read_text().count("\n") > 1):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "pgd.safetensors").exists()
    assert rows.exists()
    result = advdiff(*words, "-o", killed, "--json").json
    assert timeless(result) == timeless(expected)


def test_evaluate_judges_a_defense_over_draws(advdiff, test_x, classifier, ddpm, tmp_path):
    adv, csv = tmp_path / "adv.h5", tmp_path / "p.csv"
    defense = ["-m", ddpm, "--t-star", "0.05", "--sampler-steps", 1]
    attack = ["attack", test_x, "--limit", 6, "-c", classifier, *defense, "--steps", 2, "--eot", 2]
    advdiff(*attack, "--batch-size", 6, "-o", adv)
    both = ["evaluate", test_x, adv, "-c", classifier, *defense, "--limit", 6, "--draws", 5, "--precision", "fp32"]
    result = advdiff(*both, "--predictions", csv, "--json")
    assert "control" not in result.err
    clean, attacked = result.json["sets"]
    assert clean["draws"] == attacked["draws"] == 5
    assert {"vote_1", "vote_5", "all_correct"} <= clean.keys()
    assert "vote_11" not in clean
    assert result.json["defense"]["draws"] == 5
    lines = [line.split(",") for line in csv.read_text().splitlines()[1:]]
    assert len(lines) == 2 * 6 * 5
    mean = sum((float(p) > 0.5) == (label == "1") for s, *_, label, _, p in lines if s == str(test_x)) / 30
    assert clean["accuracy"]["value"] == pytest.approx(mean)
    alone = advdiff("evaluate", adv, "-c", classifier, *defense, "--draws", 1)
    assert "clean control is missing" in alone.err
    noise = advdiff("evaluate", test_x, "-c", classifier, "--defense", "noise", "--draws", 3, "--limit", 6, "--json")
    assert noise.json["defense"]["defense"] == "noise"


@pytest.mark.parametrize("form", ["file", "folder"])
def test_images_unchanged_are_judged_the_same(advdiff, patches, form, test_x, classifier, ddpm, tmp_path):
    """An attack of no size: every figure equals the clean one on the shared draws, whatever the form of the set."""
    test_x = test_x if form == "file" else patches / "images" / "test"
    same = tmp_path / "same.h5"
    advdiff("attack", test_x, "--limit", 6, "-c", classifier, "--steps", 1, "--eps", "1e-30", "-o", same)
    defense = ["-m", ddpm, "--t-star", "0.05", "--sampler-steps", 1, "--draws", 5]
    result = advdiff("evaluate", test_x, same, "-c", classifier, *defense, "--limit", 6, "--json").json
    clean, adv = result["sets"]
    assert {k: v for k, v in clean.items() if k not in ("data", "history")} == {
        k: v for k, v in adv.items() if k not in ("data", "history")
    }
    assert result["comparisons"][0]["difference"]["value"] == 0
    with h5py.File(same) as h5:
        assert h5["images"].shape[0] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draws", 3], "--draws is about a defense's noise"),
        (["--t-star", "0.1"], "give -m, or --defense noise"),
    ],
)
def test_settings_of_a_defense_need_one(advdiff, test_x, classifier, words, message):
    assert message in advdiff("evaluate", test_x, "-c", classifier, *words, code=1).err


def test_what_others_left_among_the_seconds_and_results_is_passed_over(tmp_path):
    journal = journal_path(tmp_path, 0, 1)
    with TimingLog(journal, {"a": 1}):
        pass
    spent = recorded_seconds(tmp_path, {"a": 1})
    ours = json.loads(journal.read_text())["of"]
    with journal.open("a") as file:
        file.write(f'garbage\n[]\n{{"of": 1}}\n{{"of": "{ours}"}}\n{{"of": "{ours}", "seconds": [], "anew": true}}\n')
    assert recorded_seconds(tmp_path, {"a": 1}) == spent
    for text in ("{}", "[]", "null", '{"result": 1, "recipe": 2}', "not json"):
        (tmp_path / "r.json").write_text(text)
        assert cached_result(tmp_path / "r.json", {"command": "x"}) is None


def test_two_processes_may_keep_the_same_result(tmp_path):
    kept = tmp_path / "clean.json"
    with atomic_write(kept) as mine, atomic_write(kept) as theirs:
        mine.write_text("1")
        theirs.write_text("1")
        assert not kept.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["clean.json"]
    with pytest.raises(OSError, match="full"), atomic_write(kept) as third:
        third.write_text("half")
        raise OSError("full")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("clean.json", "1")]


def test_only_gradients_of_the_unet_are_another_recipe_when_it_is_compiled():
    ddpm, noise = DefenseSpec("ddpm", 0.1, "ddpm", 1), DefenseSpec("noise", 0.1)

    class Patches:
        def recipe_input(self):
            return {}

    def differ(method, of=ddpm, **asked):
        spec = resolve(method, "linf", 2 / 255, AttackRequest(**asked), defended=True)
        models = [EvaluatedModel(None, "c", Defense(None, of, "m"), "fp32", compiled) for compiled in (False, True)]
        plain, compiled = (AttackJob(model, spec, Patches(), 0, 4, None).recipe for model in models)
        return plain != compiled

    assert differ("pgd")
    assert differ("apgd", gradient="surrogate", attack_sampler_steps=1)
    assert not any(differ("pgd", gradient=g) for g in ("blind", "bpda"))
    assert not differ("square")
    assert not differ("random")
    assert not differ("pgd", of=noise)
