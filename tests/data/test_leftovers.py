"""What a killed run leaves beside its output is gone after the next run, and nothing else is."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from advdiff_cli.data.atomic_files import atomic_write, remove_temporaries
from advdiff_cli.data.locks import OutputLock, lock_file
from advdiff_cli.data.provenance import recipe
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.result_cache import cached_predictions, store_predictions

NOISE = ["--defense", "noise", "--t-star", "0.1"]
COMMANDS = {
    "attack": ("out.h5", ["--method", "fgsm"]),
    "predict": ("out.csv", [*NOISE, "--draws", "6"]),
    "certify": ("out.csv", [*NOISE, "--n0", "2", "--n", "4"]),
    "purify": ("out.safetensors", NOISE),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_leftovers_of_a_finished_output_are_removed(command, advdiff, test_x, classifier, tmp_path):
    name, options = COMMANDS[command]
    out, model = tmp_path / name, [] if command == "purify" else ["-c", classifier]
    run = [command, test_x, *model, *options, "--limit", 4, "-o", out]
    advdiff(*run)
    finished = {p.name for p in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:  # killed while it tidied up, or wrote the table
        patch.setattr("advdiff_cli.data.atomic_files.os.replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if (child := os.fork()) == 0:
            with atomic_write(out) as temporary:
                temporary.touch()
        os.waitpid(child, 0)
    lock_file(out).touch()
    (tmp_path / f"{name}.part.rows").touch()
    (tmp_path / "mine.part").touch()
    left = {p.name for p in tmp_path.iterdir()} - finished
    assert len(left) == 4
    advdiff(*run, "--dry-run")
    assert {p.name for p in tmp_path.iterdir()} - finished == left
    assert "up to date" in advdiff(*run).err
    assert {p.name for p in tmp_path.iterdir()} == finished | {"mine.part"}


def test_unfinished_work_of_another_recipe_stays(advdiff, test_x, classifier, tmp_path):
    out = tmp_path / "out.csv"
    run = ["predict", test_x, "-c", classifier, *NOISE, "--draws", 6, "--limit", 4]
    advdiff(*run, "-o", out)
    advdiff(*run, "--seed", 1, "-o", tmp_path / "other.csv")
    other = tmp_path / "other.csv.advdiff"
    work = tmp_path / "out.csv.part"
    for begun, stays in ((other, True), (tmp_path / "out.csv.advdiff", False)):
        work.write_text(json.dumps(json.loads(begun.read_text())["provenance"]) + "\n")
        assert "up to date" in advdiff(*run, "-o", out).err
        assert work.exists() == stays


def test_predictions_that_are_being_stored_stay(tmp_path, monkeypatch):
    """Another process that removes leftovers meanwhile takes nothing, although safetensors can replace files."""
    path = tmp_path / "p.safetensors"
    monkeypatch.setattr("advdiff_cli.data.atomic_files.sync", lambda _: remove_temporaries(path))
    made, found = recipe("robustness", {}), Predictions(np.array([0, 1]), np.array([[0.5], [0.25]]))
    store_predictions(path, made, found, np.arange(2))
    np.testing.assert_array_equal(cached_predictions(path, made).p1, found.p1)


def test_a_disk_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr("advdiff_cli.data.atomic_files.fcntl.flock", refuse)
    for text in ("first", "second"):
        with atomic_write(tmp_path / "a.csv") as temporary:
            temporary.write_text(text)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["second"]


def test_files_of_running_processes_stay(tmp_path):
    out = tmp_path / "a.csv"
    code = "import sys; from pathlib import Path; from advdiff_cli.data.atomic_files import atomic_write\n"
    code += "with atomic_write(Path(sys.argv[1])) as t: t.write_text('whole'); print(flush=True); sys.stdin.read()"
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    running.stdout.readline()
    (temporary,) = tmp_path.glob(".advdiff.*")
    remove_temporaries(out)
    assert temporary.exists()
    with atomic_write(out) as mine:
        mine.write_text("first")
    assert temporary.exists()
    running.communicate("")
    assert out.read_text() == "whole"
    shutil.copy(out, temporary)  # of a killed process
    with OutputLock(out), atomic_write(tmp_path / "b.csv"):
        assert temporary.exists()  # of another output
    remove_temporaries(out)
    assert not temporary.exists()
