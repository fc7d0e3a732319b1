"""README and docs: every command is there, code blocks run, links lead somewhere, the reference is up to date."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from advdiff_cli.main import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"
CERTIFICATES = ROOT / "docs" / "certificates.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
COMMANDS = typer.main.get_command(app).commands


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def words(text):
    """Return a text without markup, so that the version of Typer that laid it out does not matter."""
    return re.findall(r"[\w*/.,:;'+-]+", html.unescape(text))


def test_readme_is_short_and_lists_every_command():
    listed = re.findall(r"^\| `([a-z-]+)` \|", README.read_text(), re.M)
    assert sorted(listed) == sorted(COMMANDS)
    assert len(README.read_text().split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, link


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_is_up_to_date(name):
    """`make reference` writes it; each command's help and options are there, and no others."""
    text = (ROOT / "docs" / "reference.md").read_text()
    _, heading, section = text.partition(f"\n## `advdiff {name}`\n")
    assert heading, "run make reference"
    section = section.partition("\n## `")[0]
    found = " ".join(words(section))
    command = COMMANDS[name]
    assert " ".join(words(command.help)) in found, "run make reference"
    for parameter in command.params:
        assert " ".join(words(parameter.help or "")) in found, f"{parameter.name}: run make reference"
    flags = set(re.findall(r"^\* `(?:-\w, )?(--[a-z-]+)", section, re.M))
    known = {f for p in command.params for f in [*p.opts, *p.secondary_opts] if f.startswith("--")}
    assert flags <= known | {"--help"}, "run make reference"


def run_blocks(page, warm, folder):
    """Run the bash blocks of a page one after another, then its Python blocks, beside the examples."""
    (folder / "examples").symlink_to(ROOT / "examples")
    env = {**warm, "PYTHONPATH": str(ROOT)}
    script = "set -euo pipefail\n" + "\n".join(blocks(page, "bash"))
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for block in blocks(page, "python"):
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_code_blocks_of_the_readme_run(warm, tmp_path):
    run_blocks(README, warm, tmp_path)
    purified = list((tmp_path / "purified").rglob("*.png"))
    assert len(purified) == len(list((ROOT / "examples" / "patches").rglob("*.jpg"))) == 64


@pytest.mark.slow
def test_code_blocks_of_the_page_on_certificates_run(warm, tmp_path):
    run_blocks(CERTIFICATES, warm, tmp_path)
    assert (tmp_path / "radii.tsv").is_file()


@pytest.mark.slow
def test_code_blocks_of_the_guide_run(warm, tmp_path):
    run_blocks(GUIDE, warm, tmp_path)
    (documented,) = (json.loads(block) for block in blocks(GUIDE, "json"))
    printed = json.loads((tmp_path / "result.json").read_text())
    assert set(printed) == set(documented)
    assert set(printed["sets"][0]) == set(documented["sets"][0])


@pytest.mark.slow
def test_the_script_of_the_guide_runs_verbatim_and_again(warm, patches, tmp_path):
    (script,) = blocks(GUIDE, "shell")
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
    (documented,) = (json.loads(block) for block in blocks(GUIDE, "json"))
    printed = advdiff("evaluate", test_x, test_x, "-c", classifier, "--limit", 4, "--json").json
    assert set(printed["comparisons"][0]) == set(documented["comparisons"][0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_shell_blocks_name_real_commands_and_options(page):
    """Blocks that need a download are not run; the options that they name exist all the same."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [line.split("#")[0].replace("-m advdiff_cli", "advdiff") for line in text.splitlines()]
    for line in lines:
        if "advdiff " not in line:
            continue
        name, *rest = line[line.index("advdiff ") :].split()[1:]
        known = {flag for p in COMMANDS[name].params for flag in [*p.opts, *p.secondary_opts]}
        assert {w for w in rest if w.startswith("-") and w != "-"} <= known, line
