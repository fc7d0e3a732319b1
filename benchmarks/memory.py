#!/usr/bin/env python3
"""Peak memory and time of purify and attack for growing numbers of patches, and of a gradient for draws and steps.

    python benchmarks/memory.py WORK_DIR [--sizes 1000 10000] [--forms safetensors hdf5 pcam folder]

Random patches of 96x96 are written in each form. `purify` runs with one step of the bundled synthetic-ddpm, `attack`
with one step on the bundled synthetic-classifier. Each runs in its own process, whose peak resident memory (VmHWM) and
total seconds are reported. The sizes reveal memory that grows with N (10,000 patches are 1.1 GB as float32) and time
that grows faster than N.

Then `attack -m` runs through the bundled pcam-ddpm on 8 patches of synthetic tissue, in one step of exact gradients,
with more and more draws and reverse steps.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

FORMS = ["safetensors", "hdf5", "pcam", "folder"]


def make(form: str, n: int, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, 96, 96), np.uint8)
    labels = rng.integers(0, 2, n)
    path = folder / {"safetensors": f"{n}.safetensors", "hdf5": f"{n}.h5", "pcam": f"{n}", "folder": f"images{n}"}[form]
    if form == "safetensors":
        save_file({"images": images, "labels": labels}, path)
    elif form == "hdf5":
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=images, chunks=(32, 3, 96, 96))
            file["labels"] = labels
    elif form == "pcam":
        (path / "pcam").mkdir(parents=True, exist_ok=True)
        for key, array in {
            "x": images.transpose(0, 2, 3, 1),
            "y": labels.reshape(-1, 1, 1, 1).astype(np.uint8),
        }.items():
            with h5py.File(path / "pcam" / f"camelyonpatch_level_2_split_test_{key}.h5", "w") as file:
                file.create_dataset(key, data=array, chunks=(min(32, n), *array.shape[1:]))
    else:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            (path / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path / str(label) / f"{i:06}.png", compress_level=0)
    return path


CHILD = """
import re, sys
from advdiff_cli.main import main
try:
    main()
finally:  # getrusage would count the parent's memory at the fork
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def peak(*arguments: object) -> tuple[float, float]:
    """Run a command and return its peak resident memory in MB, and the seconds it took."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr}")
    return int(done.stderr.split()[-1]) / 1024, time.monotonic() - started


def cells(measured: list[tuple[float, float]]) -> str:
    return "  ".join(f"{mb:6.0f} MB {seconds:7.1f} s" for mb, seconds in measured)


def gradients(work: Path, ddpm: str) -> None:
    """Print the peak memory of exact gradients over draws, and over sampler steps."""
    tissue, models = work / "tissue.safetensors", ["-c", "synthetic-classifier", "-m", ddpm, "--t-star", "0.1"]
    peak("synthesize", "-n", 8, "-o", tissue, "-q")
    for name, cases in (
        ("draws", [(1, 1), (4, 1), (16, 1)]),
        ("sampler steps", [(1, 1), (1, 4), (1, 16)]),
    ):
        for eot, steps in cases:
            how = [*models, "--steps", 1, "--eot", eot, "--sampler-steps", steps, "--batch-size", 8]
            used, _ = peak("attack", tissue, *how, "-o", work / "adv.safetensors", "-q", "--overwrite")
            print(f"exact gradient, {name:13} {eot if name == 'draws' else steps:2}  {used:6.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[1000, 10_000], help="numbers of patches; none: gradients alone"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="forms of patch sets")
    parser.add_argument("-m", dest="ddpm", default="pcam-ddpm", help="diffusion model of the gradients")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    gradients(args.work, args.ddpm)
    if not args.sizes:
        return
    print(f"{'peak memory and time':23}{'  '.join(f'n = {n:<14}' for n in args.sizes)}")
    for form in args.forms:
        sets = [make(form, n, args.work) for n in args.sizes]
        split = ["--split", "test"] if form == "pcam" else []
        outs = {"purify": ".h5" if form == "hdf5" else ".safetensors", "attack": ".safetensors"}
        extra = {
            "purify": ["-m", "synthetic-ddpm", "--sampler-steps", 1],
            "attack": ["-c", "synthetic-classifier", "--steps", 1],
        }
        for command in ("purify", "attack"):
            peaks = []
            for n, data in zip(args.sizes, sets, strict=True):
                out = args.work / f"{form}-{command}-{n}{outs[command]}"
                peaks.append(peak(command, data, *split, *extra[command], "-o", out, "-q"))
                out.unlink()
            print(f"{form:12} {command:9} {cells(peaks)}", flush=True)
        if form == "folder":
            peaks = [peak("purify", d, *extra["purify"], "-o", args.work / f"out{d.name}", "-q") for d in sets]
            print(f"{form:12} to folder {cells(peaks)}", flush=True)


if __name__ == "__main__":
    main()
