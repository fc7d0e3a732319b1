#!/usr/bin/env python3
"""Time from the start of `advdiff purify` to its first batch, less the import of torch and diffusers.

    python benchmarks/startup.py WORK_DIR [--rounds 5]

Two kinds of process take turns: one imports both libraries, the other purifies one patch in one step with the bundled
pcam-ddpm. The medians and their difference are printed. The difference contains the command line, the loading of the
model, one U-Net evaluation and the writing.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


def seconds(*command: str) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data, out = str(args.work / "one.safetensors"), str(args.work / "purified.safetensors")
    advdiff = ("-m", "advdiff_cli")
    seconds(*advdiff, "synthesize", "-n", "1", "-o", data, "--overwrite")
    imports, purify = [], []
    for _ in range(args.rounds + 1):
        imports.append(seconds("-c", "import torch, diffusers; diffusers.UNet2DModel"))
        purify.append(seconds(*advdiff, "purify", data, "-m", "pcam-ddpm", "-o", out, "--overwrite"))
    first, second = median(imports[1:]), median(purify[1:])  # the first round warmed the disk's cache
    print(f"importing torch and diffusers {first:.2f} s, purifying one patch {second:.2f} s", end=": ")
    print(f"{second - first:.2f} s beyond, medians of {args.rounds}")


if __name__ == "__main__":
    main()
