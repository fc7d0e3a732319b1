#!/usr/bin/env python3
"""Inject faults at random moments into every long command, run the command again, and compare the result.

    python benchmarks/faults.py WORK_DIR [--faults 20] [--seed 0] [--only attack ...] [--kinds damage ...]

The commands are train-ddpm, train-classifier, attack to HDF5, purify to safetensors, purify of a folder, and the
download of a file from a local server. The faults are kill -9; SIGTERM, which must end in status 143 and one line; a
limit on file sizes; a clock that jumps by years whenever it is read; damage, which is kill -9 and then a file of the
work in progress that is truncated, changed or removed; and, if this process may mount one, a full disk. Each fault
strikes at a random moment, size or file.

A command survives a fault if nothing but the complete result stands under the final name, and if the next run ends in
the same rows, files or weights, to the bit, as a run without faults. After damage it may also refuse to go on, in one
line. The tables count faults by kind and command.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.pcam_files import PREFIX
from advdiff_cli.datasets import download
from advdiff_cli.datasets.pcam import RemoteFile
from advdiff_cli.datasets.synthetic import SyntheticSource
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.main import main
from advdiff_cli.models.classifier_config import ClassifierConfig
from advdiff_cli.models.classifiers import Classifier, save_classifier
from advdiff_cli.models.ddpm import build_ddpm, save_ddpm
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.training import checkpoints

PATCHES = 24
NAME = f"{PREFIX}_test_x.h5"


class Task:
    """A command that makes OUT, and what tells its results apart."""

    def __init__(self, name: str, out: str, run: Callable[[Path], object], tell: Callable[[Path], str]) -> None:
        self.name, self.out, self.run, self.tell = name, out, run, tell

    def result(self, folder: Path) -> str | None:
        out = folder / self.out
        return self.tell(out) if out.exists() else None


def prepare(work: Path) -> None:
    source = SyntheticSource(PATCHES, 0)
    images = source.read(np.arange(PATCHES))
    with h5py.File(work / "data.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(4, *images.shape[1:]))
        file["labels"] = source.labels
    (work / "images").mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(work / "images" / f"{i}.png")
    torch.manual_seed(0)
    config = ClassifierConfig("squeezenet1_1", (0.7, 0.55, 0.7), (0.2, 0.25, 0.2))
    save_classifier(Classifier(config), work / "classifier", {"recipe": {"command": "test", "parameters": {}}})
    save_ddpm(build_ddpm("tiny", 96, 0.3, 0), work / "ddpm")
    checkpoints.CHECKPOINT_SECONDS = 0.2


def tasks(work: Path, mirror: str, registry: dict[str, RemoteFile]) -> list[Task]:
    data, models = work / "data.h5", ["-c", work / "classifier"]
    through = ["-m", work / "ddpm", "--t-star", "0.05", "--sampler-steps", 2, "--batch-size", 2]

    def command(name: str, out: str, tell: Callable[[Path], str], *arguments: object) -> Task:
        def run(folder: Path) -> None:
            sys.argv = ["advdiff", *map(str, arguments), "-o", str(folder / out)]
            main()

        return Task(name, out, run, tell)

    def fetch(folder: Path) -> None:
        for step in download.plan("test", folder, registry):
            for _ in download.run(step, mirror):
                pass

    fit = ["--valid", data, "--batch-size", 4]
    return [
        command("train-ddpm", "d", _model, "train-ddpm", data, *fit, "--preset", "tiny", "--steps", 24),
        command(
            "train-classifier",
            "c",
            _model,
            "train-classifier",
            data,
            *fit,
            "--arch",
            "mobilenet_v3_small",
            "--epochs",
            4,
        ),
        command("attack, HDF5", "a.h5", _rows, "attack", data, *models, "--steps", 6, "--batch-size", 2),
        command("purify, safetensors", "p.safetensors", _rows, "purify", data, *through),
        command("predict", "d.csv", _bytes, "predict", data, *models, *through[:-2], "--draws", 6),
        command("purify, folder", "f", _files, "purify", work / "images", *through),
        Task("download", f"pcam/{NAME}", fetch, _bytes),
    ]


def _is_work(path: Path) -> bool:
    """Return whether a file is one of unfinished work, a journal or a record."""
    return any(".part" in part for part in path.parts) or path.suffix in (".jsonl", ".advdiff")


def _without_log(result: str) -> str:
    """Return what tells a result apart, for a model without its log, whose damage is told and not repaired."""
    return result if result.startswith("{") else result.partition(" ")[0]


def _rows(path: Path) -> str:
    return open_patches(path).fingerprint()


def _bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _model(folder: Path) -> str:
    left = sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != "samples.png")
    log = folder / "training.jsonl"
    told = log.read_text(errors="replace") if log.exists() else ""  # a trial may have damaged or removed it
    return f"{folder_fingerprint(folder)} {told} {left}"


def _files(folder: Path) -> str:
    """Tell the images apart; a folder grows file by file, so that one with fewer of them is told as unfinished."""
    images = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("[!.]*.png"))}
    return json.dumps(images)


@contextmanager
def server(work: Path):
    """Serve a gzipped PCam file slowly, with Range; yield its address and its registry."""
    rows = np.random.default_rng(0).integers(0, 256, (40, 96, 96, 3), np.uint8)
    with h5py.File(work / NAME, "w") as file:
        file["x"] = rows
    subprocess.run(["gzip", "-kf1", str(work / NAME)], check=True)
    packed = (work / f"{NAME}.gz").read_bytes()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(packed) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(packed) - 1}/{len(packed)}")
            self.end_headers()
            with suppress(OSError):
                for at in range(start, len(packed), 1 << 16):
                    self.wfile.write(packed[at : min(at + (1 << 16), len(packed))])
                    time.sleep(0.02)

        def log_message(self, *_):
            pass

    md5 = hashlib.md5((work / NAME).read_bytes()).hexdigest()
    remote = RemoteFile(len(packed), hashlib.sha256(packed).hexdigest(), rows.nbytes, md5)
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}", {f"{NAME}.gz": remote}
    serving.shutdown()


class Run:
    """A task in a process of its own."""

    def __init__(self, task: Task, folder: Path, log: Path, most: int | None = None, *, clock: bool = False) -> None:
        self.log = log
        self.process = os.fork()
        if self.process:
            return
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            torch.set_num_threads(2 if task.name.startswith("purify") else 1)  # whose threads share no layer
            if clock:
                time.time = lambda: random.uniform(0, 4e9)
            if most is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            task.run(folder)
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except (AdvdiffError, OSError) as e:  # which main() tells in one line
            print(f"advdiff: error: {e}", file=sys.stderr)
        except BaseException as e:
            print(f"Traceback: {e!r}", file=sys.stderr)
        os._exit(code)

    def ended(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(0.005)
        return False

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


class Trial:
    """The faults of one kind in one command, and what became of them."""

    def __init__(self, task: Task, work: Path, rng: random.Random) -> None:
        self.task, self.work, self.rng = task, work, rng
        self.log = work / "log"
        self.lost: list[str] = []
        begun = time.monotonic()
        self.whole = self.finish(work / "whole", compare=False)
        self.seconds = time.monotonic() - begun

    def finish(self, folder: Path, *, compare: bool = True) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        code = Run(self.task, folder, self.log).wait()
        found = self.task.result(folder)
        if code or found is None or (compare and found != self.whole):
            self.lost.append(f"{self.task.name}: the run after a fault ended in {code}: {self.log.read_text()[-500:]}")
        return found or ""

    def inject(self, kind: str, folder: Path) -> bool:
        """Let a fault happen; return whether it did before the command ended."""
        sizes = [p.stat().st_size for p in (self.work / "whole").rglob("*") if p.is_file()]
        if kind == "full disk":
            with ballast(folder, self.rng.randrange(sum(sizes))):
                code = Run(self.task, folder, self.log).wait()
        elif kind == "file size":
            code = Run(self.task, folder, self.log, self.rng.randrange(1, max(sizes))).wait()
        elif kind == "clock":
            code = Run(self.task, folder, self.log, clock=True).wait()
        else:
            run = Run(self.task, folder, self.log)
            if not run.ended(self.rng.uniform(0, self.seconds)):
                os.kill(run.process, signal.SIGKILL if kind == "kill -9" else signal.SIGTERM)
            code = run.wait()
        self._check(kind, code, folder)
        return code != 0

    def damage(self, folder: Path) -> bool:
        """Kill the command, damage a file of its work in progress, and run it again; return whether there was one."""
        run = Run(self.task, folder, self.log)
        if not run.ended(self.rng.uniform(0.3, 1) * self.seconds):
            os.kill(run.process, signal.SIGKILL)
        run.wait()
        begun = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and _is_work(p.relative_to(folder))]
        if not begun:
            return False
        file, kind = self.rng.choice(sorted(begun)), self.rng.choice(("truncated", "changed", "removed"))
        raw = bytearray(file.read_bytes())
        at = self.rng.randrange(len(raw))
        if kind == "removed":
            file.unlink()
        elif kind == "truncated":
            file.write_bytes(raw[:at])
        else:
            raw[at : at + 16] = self.rng.randbytes(len(raw[at : at + 16]))
            file.write_bytes(raw)
        code = Run(self.task, folder, self.log).wait()
        told, found = self.log.read_text(), self.task.result(folder)
        good = code == 0 and found is not None and _without_log(found) == _without_log(self.whole)
        partly = self.task.tell is _files and json.loads(found or "{}").items() <= json.loads(self.whole).items()
        refused = code in (1, 3) and told.count("advdiff: error") == 1 and (found in (None, self.whole) or partly)
        if "Traceback" in told or not (good or refused):
            name = file.relative_to(folder)
            self.lost.append(f"{self.task.name}: {name} {kind} at {at}, ended in {code}: {told[-500:]}")
        return True

    def _check(self, kind: str, code: int, folder: Path) -> None:
        told = self.log.read_text()
        allowed = {"kill -9": (0, -9), "SIGTERM": (0, 143, -15), "clock": (0,)}.get(kind, (0, 1))
        if code not in allowed or "Traceback" in told or (code == 1 and told.count("advdiff: error") != 1):
            self.lost.append(f"{self.task.name}: {kind} ended in {code}: {told[-500:]}")
        found = self.task.result(folder)
        if found is None or found == self.whole:
            return
        if self.task.tell is _files and json.loads(found).items() <= json.loads(self.whole).items():
            return
        self.lost.append(f"{self.task.name}: {kind} left something else under the final name")


@contextmanager
def ballast(folder: Path, free: int):
    """Fill the disk of `folder` but for `free` bytes."""
    weight = folder.parent / "ballast"
    room = os.statvfs(folder)
    with weight.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - free))
    try:
        yield
    finally:
        weight.unlink()


@contextmanager
def small_disk(place: Path):
    """Mount a disk of 200 MB; yield None where that is not allowed."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def try_faults(
    task: Task, work: Path, faults: int, rng: random.Random, disk: Path | None, kinds: list[str] | None
) -> tuple[Counter, list[str]]:
    trial, counts = Trial(task, work / task.name.replace(", ", "-"), rng), Counter()
    struck = ["kill -9", "SIGTERM", "file size", "clock", *(["full disk"] if disk else [])]
    for kind in (k for k in struck if kinds is None or k in kinds):
        folder = (disk if kind == "full disk" and disk else trial.work) / kind.replace(" ", "-")
        folder.mkdir()
        for _ in range(faults):
            happened = trial.inject(kind, folder)
            counts[kind] += happened or kind == "clock"  # which goes on to the end
            if not happened or rng.random() < 0.3:  # else the next fault falls on what this one left
                trial.finish(folder)
                subprocess.run(["rm", "-rf", str(folder)], check=True)
                folder.mkdir()
        trial.finish(folder)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    for _ in range(faults if kinds is None or "damage" in kinds else 0):
        folder = trial.work / "damage"
        folder.mkdir()
        counts["damage"] += trial.damage(folder)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return counts, trial.lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--faults", type=int, default=20, help="of each kind, in each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="of faults; all by default")
    parser.add_argument("--only", nargs="*", help="commands, as purify")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a fork of a process with a pool of threads waits for them for ever
    asked.work.mkdir(parents=True)  # a new folder
    prepare(asked.work)
    failures: list[str] = []
    with server(asked.work) as (mirror, registry), small_disk(asked.work / "disk") as disk:
        if disk is None:
            print("no disk can be mounted here: the full disk is left out", file=sys.stderr)
        for task in tasks(asked.work, mirror, registry):
            if asked.only and task.name.partition(",")[0] not in asked.only:
                continue
            (asked.work / task.name.replace(", ", "-")).mkdir()
            counts, lost = try_faults(task, asked.work, asked.faults, random.Random(asked.seed), disk, asked.kinds)
            told = ", ".join(f"{kind} {n}" for kind, n in counts.items())
            print(f"{task.name:22} {told}; {len(lost)} lost or wrong", flush=True)
            failures += lost
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(bool(failures))
