"""What every command promises the shell."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import typer.main

from advdiff_cli.main import app

COMMANDS = [c.name for c in app.registered_commands]
ENV = {**os.environ, "COLUMNS": "100"}


def run(*arguments, **keywords):
    command = [sys.executable, "-m", "advdiff_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False, **keywords)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there_without_torch_and_ends_in_an_example(command):
    code = (
        "import sys; sys.argv = ['advdiff', *sys.argv[1:]]\n"
        "from advdiff_cli.main import main\n"
        "try: main()\n"
        "finally: print({'torch', 'diffusers', 'matplotlib', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    words = [command, "--help"] if command else ["--help"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0
    assert done.stderr.strip() == "set()"
    assert "\x1b" not in done.stdout
    if command:
        assert f"Example: advdiff {command}" in " ".join(done.stdout.split())


def test_the_same_flag_means_the_same_everywhere():
    """A flag has the same short form in every command."""
    group = typer.main.get_command(app)
    seen = {}
    own = {"--quiet"}  # says what it prints alone
    for command in group.commands.values():
        for parameter in command.params:
            for flag in parameter.opts:
                if flag in own or not flag.startswith("--") or flag == "--help":
                    continue
                told = tuple(sorted(parameter.opts))
                assert seen.setdefault(flag, told) == told, f"{command.name} {flag}"


@pytest.fixture
def steps(test_x, classifier, ddpm, tmp_path):
    """A small run of each command."""
    adv, pure, few = tmp_path / "adv.safetensors", tmp_path / "pure.h5", ["--limit", 5]
    through = ["-c", classifier, "-m", ddpm, "--t-star", "0.05", "--sampler-steps", 1]
    one_pass = ["--steps", 1, "--sampler-steps", 1, "--draws", 1]
    plain = tmp_path / "plain.json"
    return {
        "synthesize": ["-n", 4, "-o", tmp_path / "s.h5"],
        "attack": [test_x, "-c", classifier, "-o", adv, "--steps", 2, *few, "--eps", "8/255"],
        "purify": [adv, *through[2:], "-o", pure],
        "evaluate": [test_x, adv, pure, "-c", classifier, *few],
        "predict": [adv, "-c", classifier, "-o", tmp_path / "decisions.csv"],
        "certify": [pure, *through, "--limit", 2, "--n", 20, "-o", tmp_path / "certificates.csv"],
        "info": [pure],
        "merge": [adv, "-o", tmp_path / "merged.h5"],
        "models": [],
        "train-ddpm": [test_x, "--preset", "tiny", "--steps", 1, "--batch-size", 2, "-o", tmp_path / "d"],
        "train-classifier": [
            *[adv, "--valid", adv, "-o", tmp_path / "c"],
            *"--arch squeezenet1_1 --epochs 1 --batch-size 2".split(),
        ],
        "sweep": [test_x, *through[:4], *few, "--values", "0.02,0.05", *one_pass, "-o", tmp_path / "sweep"],
        "robustness": [test_x, *through, *few, "--only", "random", "-o", tmp_path / "suite"],
        "report": ["--result", f"plain={plain}", "-o", tmp_path / "report"],
        "download-pcam": ["--split", "test", "--data-dir", tmp_path, "--dry-run"],
    }


PRINT_NUMBERS = {"evaluate", "sweep", "robustness"}
"""Commands whose --quiet prints a number; it is an accuracy, or what a sweep chose."""


def test_streams(advdiff, steps, tmp_path):
    """--json is one object, --quiet one line (or one a set), and no ANSI; the result alone is on stdout."""
    assert set(steps) | {"bench", "compare", "demo"} == set(COMMANDS)  # those have tests of their own
    for command, arguments in steps.items():
        first = advdiff(command, *arguments, "--json")
        assert isinstance(json.loads(first.out), dict), command
        if command == "evaluate":
            two = advdiff(command, *arguments[:2], *arguments[3:], "--json")
            (tmp_path / "plain.json").write_text(two.out)
        again = advdiff(command, *arguments)
        assert "\x1b" not in again.out + again.err
        assert len(again.out.splitlines()) >= 1
        quiet = advdiff(command, *arguments, "-q").out.splitlines()
        if command in PRINT_NUMBERS:
            assert [0 <= float(line) <= 1 for line in quiet] == [True] * (3 if command == "evaluate" else 1), command
        elif command != "models":
            assert len(quiet) == 1, command
        if "-o" in map(str, arguments) and command not in {*PRINT_NUMBERS, "report"}:
            assert quiet == [str(arguments[arguments.index("-o") + 1])]
            assert "up to date" in again.err, command


def test_usage_errors_exit_2():
    assert run("attack").returncode == 2
    assert run("nonesuch").returncode == 2
    done = run("attack", "x", "-c", "y", "-o", "z.h5", "--eps", "2/0")
    assert done.returncode == 2
    assert "2/255" in done.stderr


def test_what_is_mistyped_is_answered_with_what_was_meant():
    assert "Did you mean 'attack'" in run("atack").stderr
    for typed, meant in (("--epz", "--eps"), ("--tstar", "--t-star"), ("--sampler-step", "--sampler-steps")):
        done = run("attack", "x", "-c", "y", "-o", "z.h5", typed, "1")
        assert done.returncode == 2
        assert meant in done.stderr, typed


def test_shells_complete_commands_and_options():
    def complete(words, at):
        env = {**ENV, "_ADVDIFF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        command = [sys.executable, "-c", "from advdiff_cli.main import app; app(prog_name='advdiff')"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout.split()

    assert complete("advdiff pur", 1) == ["purify"]
    assert complete("advdiff purify --sampler", 2) == ["--sampler", "--sampler-steps"]


def test_narrow_terminals(warm, test_x, classifier):
    for columns in ("20", "1"):
        done = subprocess.run(
            ["advdiff", "evaluate", str(test_x), "-c", str(classifier), "--limit", "2"],
            env={**warm, "COLUMNS": columns},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "accuracy" in done.stdout  # a table is not cut: it may be read by a program


@pytest.mark.parametrize("color", [True, False])
def test_no_color_when_asked(test_x, ddpm, tmp_path, color):
    """On a terminal there is a live bar; NO_COLOR keeps color out of it, and of nothing else."""
    ours, theirs = pty.openpty()
    command = ["purify", test_x, "-m", ddpm, "--t-star", "0.02", "--sampler-steps", 1, "--limit", 2]
    env = {**ENV, "TERM": "xterm-256color"} | ({} if color else {"NO_COLOR": "1"})
    done = subprocess.Popen(
        [sys.executable, "-m", "advdiff_cli", *map(str, command), "-o", str(tmp_path / "p.h5")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while piece := os.read(ours, 1 << 16):
            shown += piece
    assert "\x1b" not in done.communicate()[0]
    assert b"purify" in shown
    assert bool(re.search(rb"\x1b\[[0-9;]*m", shown)) == color


def test_names_as_long_as_a_disk_takes(advdiff, test_x, ddpm, tmp_path):
    deep = tmp_path.joinpath(*["d" * 200] * 5)
    deep.mkdir(parents=True)
    command = ["purify", test_x, "-m", ddpm, "--t-star", "0.02", "--sampler-steps", 1, "--limit", 1]
    advdiff(*command, "-o", deep / "p.h5")
    told = advdiff(*command, "-o", tmp_path / ("x" * 252 + ".h5"), code=1)
    assert "File name too long" in told.err.splitlines()[-1]


@pytest.mark.parametrize("command", ["models --json", "info {adv}", "evaluate {adv} -c {classifier}"])
def test_a_closed_pipe_is_no_traceback(command, advdiff, steps, classifier):
    advdiff("attack", *steps["attack"])
    words = command.format(adv=steps["attack"][4], classifier=classifier)
    done = subprocess.run(
        f"{sys.executable} -m advdiff_cli {words} | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "signum", "code"),
    [("attack", signal.SIGINT, 130), ("purify", signal.SIGINT, 130), ("purify", signal.SIGTERM, 143)],
)
def test_a_signal_is_one_line_and_resumable(command, signum, code, test_x, classifier, ddpm, tmp_path):
    out = tmp_path / "out.safetensors"
    how = (
        ["-c", classifier, "--steps", 200]
        if command == "attack"
        else ["-m", ddpm, "--t-star", 0.3, "--sampler-steps", 300]
    )
    words = [command, test_x, *how, "-o", out, "--batch-size", 2, "--limit", 10]
    process = subprocess.Popen(
        [sys.executable, "-m", "advdiff_cli", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "3"},
    )
    _wait_for(out.with_name(out.name + ".part.rows"))
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.fullmatch(r"(.*: t\* .*\n)?advdiff: error: stopped by a signal.*\n", err)
    assert not out.exists()


def _wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")
