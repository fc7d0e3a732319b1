"""The demo: each command that it prints has the same result."""

import json
import shutil
from pathlib import Path

import pytest

from advdiff_cli.datasets.example import EXAMPLE_PATCHES


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two labeled patches of each class, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for label in "01":
        Path("patches", label).mkdir(parents=True)
        for image in sorted((EXAMPLE_PATCHES / label).iterdir())[:2]:
            shutil.copy(image, Path("patches", label))
    return "patches"


@pytest.mark.slow
def test_printed_commands_have_the_same_results(advdiff, data):
    run = ["demo", data, "-o", "out", "--seed", 1, "--precision", "fp32"]
    done = advdiff(*run)
    made = {p: p.stat().st_mtime_ns for p in Path("out").glob("*.safetensors")}
    assert len(made) == 5
    commands = [line.removeprefix("$ advdiff ") for line in done.err.splitlines() if line.startswith("$ advdiff ")]
    assert len(commands) == 5 + 3 + 1
    for command in commands:
        line, _, result = command.partition(" > ")
        again = advdiff(*line.split())
        if result:
            assert again.json["sets"] == json.loads(Path(result).read_text())["sets"]
        elif not line.startswith("report"):
            assert "is up to date" in again.err
    ours = Path("out", "DDPM.json").read_bytes()
    Path("out", "DDPM.json").write_text('{"sets": "mine"}')
    assert "DDPM.json exists and was not made by this command" in advdiff(*run, code=1).err
    Path("out", "DDPM.json").write_bytes(ours)
    summary = advdiff(*run, "--json").json
    assert {p: p.stat().st_mtime_ns for p in Path("out").glob("*.safetensors")} == made
    assert summary["n"] == 4
    for name, row in summary["rows"].items():
        sets = json.loads(Path("out", f"{name}.json").read_text())["sets"]
        assert [row["standard"], row["robust"]] == [s["accuracy"] for s in sets]
    assert Path(summary["picture"]).is_file()
    assert Path(summary["report"]).is_file()


def test_data_without_labels_is_refused(advdiff, data):
    shutil.move("patches/0", "unlabeled")
    assert "labels" in advdiff("demo", "unlabeled", "-o", "out", code=1).err
    assert not Path("out").exists()
