#!/usr/bin/env python3
"""Purify in one hundred shards, as on one hundred GPUs, some of which are killed or never started.

    python benchmarks/shards.py WORK_DIR [--shards 100] [--patches 3200] [--failing 0.3] [--seed 0]

Each shard is its own process; four run at once, in random order. Some are killed with SIGKILL at a random moment, or
left out. `merge` must report what is missing. The same commands run again until nothing is missing, and the merged file
must equal that of one process, to the bit. NoiseDefense replaces the network, since only the data handling is tested.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from advdiff_cli.data.patches import open_patches
from advdiff_cli.main import main

AT_ONCE = 4
import_module("advdiff_cli.jobs.purify_rows")  # once, before the forks


def spawn(*arguments: object) -> int:
    """Run a command in a child; return its process id."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.argv = ["advdiff", *map(str, arguments)]
        try:
            main()
        except SystemExit as e:
            os._exit(e.code or 0)
        os._exit(0)
    return child


def shard(i: int, asked: argparse.Namespace) -> tuple[object, ...]:
    return (*purification(asked), "--shard", f"{i}/{asked.shards}", "-o", asked.work / "parts" / f"{i:04}.h5")


def purification(asked: argparse.Namespace) -> tuple[object, ...]:
    return ("purify", asked.work / "data.safetensors", "--defense", "noise", "--batch-size", 8)


def run_all(shards: list[int], asked: argparse.Namespace, rng: random.Random, failing: float) -> int:
    """Run shards, `failing` of them in vain; return how many were killed or left out."""
    lost, running = 0, []
    for i in rng.sample(shards, len(shards)):
        fails = rng.random() < failing
        if fails and rng.random() < 0.3:
            lost += 1
            continue
        child = spawn(*shard(i, asked))
        if fails:
            time.sleep(rng.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            lost += 1
        running.append(child)
        if len(running) == AT_ONCE:
            os.waitpid(running.pop(0), 0)
    for child in running:
        os.waitpid(child, 0)
    return lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--patches", type=int, default=3200)
    parser.add_argument("--failing", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    (asked.work / "parts").mkdir(parents=True)  # a new folder
    images = np.random.default_rng(asked.seed).integers(0, 256, (asked.patches, 3, 96, 96), np.uint8)
    save_file({"images": images, "labels": np.arange(asked.patches) % 2}, asked.work / "data.safetensors")
    rng, todo, rounds, merged = random.Random(asked.seed), list(range(asked.shards)), 0, asked.work / "merged.h5"
    while todo:
        lost = run_all(todo, asked, rng, asked.failing if rounds < 3 else 0)
        rounds += 1
        missing = [i for i in todo if not (asked.work / "parts" / f"{i:04}.h5").exists()]
        parts = sorted((asked.work / "parts").glob("*.h5"))
        done = subprocess.run(
            [sys.executable, "-m", "advdiff_cli", "merge", *map(str, parts), "-o", str(merged)],
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"round {rounds}: {len(todo)} shards, {lost} killed or left out, {len(missing)} not there")
        print(f"  merge: {(done.stderr or done.stdout).strip()}")
        if bool(missing) != bool(done.returncode):
            sys.exit("merge did not notice what is missing, or complained of nothing")
        todo = missing
    os.waitpid(spawn(*purification(asked), "-o", asked.work / "one.h5"), 0)
    same = open_patches(merged).fingerprint() == open_patches(asked.work / "one.h5").fingerprint()
    print(f"{asked.patches} patches in {asked.shards} shards {'are' if same else 'ARE NOT'} those of one process")
    sys.exit(not same)
