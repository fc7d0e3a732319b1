"""The README: every command is there, its code blocks run, its links lead somewhere, its JSON is what is printed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from advdiff_cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_every_command_is_documented():
    listed = re.findall(r"^\| `([a-z-]+)` \|", README, re.M)
    assert sorted(listed) == sorted(c.name for c in app.registered_commands)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("https://"):
            assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_code_blocks_run(warm, tmp_path):
    env = {**warm, "PYTHONPATH": str(ROOT)}
    script = "set -euo pipefail\n" + "\n".join(blocks("bash"))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (documented,) = (json.loads(block) for block in blocks("json"))
    printed = json.loads((tmp_path / "result.json").read_text())
    assert set(printed) == set(documented)
    assert set(printed["sets"][0]) == set(documented["sets"][0])
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_script_runs_verbatim_and_again(warm, patches, tmp_path):
    (script,) = blocks("shell")
    assert 15 <= len(script.splitlines()) <= 22
    (tmp_path / "pipeline.sh").write_text(script)
    env = {**warm, "PYTHONPATH": str(ROOT), "N": "6", "STEPS": "1", "ATTACK_STEPS": "2"}
    for _ in range(2):
        command = ["bash", "pipeline.sh", str(patches)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "purified.json").read_text())["sets"]
    assert [(s["data"], s["n"]) for s in found] == [("clean-ddpm.h5", 6), ("adv-ddpm.h5", 6)]
    assert "adv.h5 is up to date" in done.stderr
    assert (tmp_path / "report" / "report.html").is_file()


def test_json_comparisons_have_the_documented_keys(advdiff, test_x, classifier):
    (documented,) = (json.loads(block) for block in blocks("json"))
    printed = advdiff("evaluate", test_x, test_x, "-c", classifier, "--limit", 4, "--json").json
    assert set(printed["comparisons"][0]) == set(documented["comparisons"][0])


def test_shell_blocks_name_real_commands_and_options():
    """Blocks that need a download are not run; what they ask for exists all the same."""
    import typer.main

    group = typer.main.get_command(app)
    lines = [line.split("#")[0].replace("-m advdiff_cli", "advdiff") for b in blocks("sh") for line in b.splitlines()]
    told = [line[line.index("advdiff ") :].split() for line in lines if "advdiff " in line]
    assert {"purify", "train-ddpm", "attack"} <= {words[1] for words in told}
    for words in told:
        known = {flag for p in group.commands[words[1]].params for flag in p.opts}
        assert {w for w in words if w.startswith("-") and w != "-"} <= known
