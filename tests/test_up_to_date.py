"""What needs no network to tell is told without importing torch: results that are up to date, facts and mistakes."""

import json
import os
import subprocess
import sys

import pytest

CODE = (
    "import sys; sys.argv = ['advdiff', *sys.argv[1:]]\n"
    "from advdiff_cli.main import main\n"
    "try: main()\n"
    "finally: print('heavy:', sorted({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))"
)


def light(*arguments, cwd=None):
    """Run a command that must not import torch, and return what it printed."""
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    assert "heavy: []" in done.stdout, done.stdout + done.stderr
    return done


@pytest.fixture
def commands(test_x, classifier, ddpm, patches, tmp_path):
    """Commands that make an output, with the names of what they make."""
    folder, through = patches / "images" / "test", ["-m", ddpm, "--t-star", "0.05", "--sampler-steps", 1]
    rows, fit = [test_x, "--limit", 6], ["--valid", test_x, "--batch-size", 20]
    return {
        "attack": [*rows, "-c", classifier, "--steps", 2, "--batch-size", 6],
        "attack, defended": [*rows, "-c", classifier, *through, "--steps", 1, "--eot", 1, "--batch-size", 6],
        "purify, file": [*rows, *through],
        "purify, folder": [folder, *through, "--limit", 6],
        "predict": [*rows, "-c", classifier, *through],
        "certify": [*rows, "-c", classifier, *through, "--n", 20],
        "train-ddpm": [test_x, *fit, "--preset", "tiny", "--steps", 1],
        "train-classifier": [
            test_x,
            *fit,
            "--arch",
            "squeezenet1_1",
            "--epochs",
            1,
            "--augment",
            f"purify:{ddpm}:0.05:1",
        ],
    }


SUFFIX = {
    "attack": ".h5",
    "attack, defended": ".safetensors",
    "purify, file": ".h5",
    "predict": ".csv",
    "certify": ".csv",
}


@pytest.mark.parametrize(
    "name",
    [
        "attack",
        "attack, defended",
        "purify, file",
        "purify, folder",
        "predict",
        "certify",
        "train-ddpm",
        "train-classifier",
    ],
)
def test_up_to_date(advdiff, commands, tmp_path, name):
    out = tmp_path / f"out{SUFFIX.get(name, '')}"
    command = [name.partition(",")[0], *commands[name], "-o", out]
    first = advdiff(*command, "--json").json
    again = light(*command, "--json")
    told = json.loads(again.stdout.splitlines()[0])
    assert again.returncode == 0
    assert "up to date" in again.stderr + str(told.get("status"))
    for key, value in first.items():
        if key not in ("status", "purified", "kept"):
            assert told[key] == value, key
    if name in ("attack", "purify, file", "predict", "certify"):
        assert "up to date" in advdiff(*command, "--dry-run").err
        assert advdiff(*command, "--dry-run", "--overwrite", "--json").json["status"].startswith("would")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("info {test_x}", 0),
        ("info {ddpm}", 0),
        ("info pcam-ddpm", 0),
        ("models", 0),
        ("purify {none} -o out", 1),
        ("purify {none} -o out.h5", 1),
        ("attack {none} -c {classifier} -o a.h5", 1),
        ("attack {test_x} -c {classifier} -o a.txt", 1),
        ("predict {none} -c {classifier} -o p.csv", 1),
        ("merge {none} -o m.h5", 1),
        ("compare {none} {none}", 1),
        ("evaluate {test_x} -c {classifier} --predictions {none}/p.csv", 1),
    ],
)
def test_facts_and_mistakes(command, code, test_x, classifier, ddpm, tmp_path):
    words = command.format(test_x=test_x, classifier=classifier, ddpm=ddpm, none=tmp_path / "none").split()
    assert light(*words, cwd=tmp_path).returncode == code
