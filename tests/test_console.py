"""What reaches the terminal: printable text, on the right stream, whatever is closed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from advdiff_cli import console
from advdiff_cli.jobs.evaluate import EvaluateJob

EVIL = "a\x1b]0;owned\x07\u202e\nadvdiff: error: forged"


def test_only_printable_text_is_printed(capsys):
    console.warn(EVIL)
    console.emit({}, f"one\n{console.printable(EVIL)}", "", as_json=False, quiet=False)
    found = capsys.readouterr()
    assert found.err == "advdiff: warning: a\\x1b]0;owned\\x07\\u202e\\nadvdiff: error: forged\n"
    assert found.out == "one\na\\x1b]0;owned\\x07\\u202e\\nadvdiff: error: forged\n"
    assert "\x1b" not in console.table(["name"], [[EVIL]])
    assert console.table(["name"], [[EVIL]]).count("\n") == 2


def test_a_name_that_is_not_utf8(tmp_path, advdiff):
    name = os.fsencode(tmp_path) + b"/caf\xe9.h5"
    made = subprocess.run(
        [sys.executable, "-m", "advdiff_cli", "synthesize", "-n", "2", "-q", "-o", name],
        capture_output=True,
        check=True,
    )
    assert made.stdout == name + b"\n"  # exact, for scripts
    told = subprocess.run([sys.executable, "-m", "advdiff_cli", "info", name], capture_output=True, check=True)
    assert b"caf\\udce9.h5: kind patch set" in told.stdout
    table = subprocess.run(
        [sys.executable, "-m", "advdiff_cli", "info", name, "--json"], capture_output=True, check=True
    )
    assert json.loads(table.stdout)["file"] == os.fsdecode(name)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    command = f"'{sys.executable}' -m advdiff_cli synthesize -n 2 -o {tmp_path / 't.h5'} {closed}"
    for _ in range(2):
        done = subprocess.run(["bash", "-c", command], capture_output=True)
        assert done.returncode == 0
        assert bool(done.stderr) == ("2>" not in closed and b"up to date" in done.stderr)
        assert b"up to date" not in done.stdout
    assert subprocess.run(["bash", "-c", f"{command} -n 3"], capture_output=True).returncode == 1


def test_a_full_gpu_is_told_in_one_line(advdiff, test_x, classifier, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(EvaluateJob, "run", full)
    told = advdiff("evaluate", test_x, "-c", classifier, code=1).err
    assert "the memory of the GPU is full; give a smaller --batch-size" in told
    assert "Traceback" not in told
