"""The harnesses of benchmarks/ that inject faults and mix images, on a small scale: what they count is none lost."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.slow


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.cpu  # its processes are forks, which CUDA does not survive
@pytest.mark.parametrize(
    ("commands", "tasks"),
    [(["train-ddpm", "purify"], 3), (["attack", "download"], 2)],  # purify has two: a file and a folder
)
def test_faults_at_random_moments(commands, tasks, tmp_path):
    told = run("faults.py", tmp_path / "work", "--faults", 1, "--kinds", "kill -9", "damage", "--only", *commands)
    assert re.findall(r"(\d+) lost or wrong", told) == ["0"] * tasks


def test_a_folder_of_all_kinds_of_images(tmp_path):
    told = run("folder.py", tmp_path / "work", "-n", 64)
    assert "; 0 lost or wrong" in told
    assert not re.search(r"(purified|named) +0$", told, re.M), told
