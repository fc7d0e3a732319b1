"""Memory that does not grow with N: ten times the patches, the same peak. benchmarks/memory.py measures more."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.cpu

CHILD = """
import re, sys
from advdiff_cli.main import main
try:
    main()
finally:  # getrusage would count the parent's memory at the fork
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".h5", ".safetensors"])
def test_peak_is_flat(suffix, tmp_path):
    """3,000 patches are 332 MB as float32; a process that held them would peak that much above one of 300."""
    peaks = []
    for n in (300, 3000):
        images = np.full((n, 3, 96, 96), 0.5, np.float32)
        path = tmp_path / f"{n}{suffix}"
        if suffix == ".h5":
            with h5py.File(path, "w") as file:
                file.create_dataset("images", data=images, chunks=(8, 3, 96, 96))
        else:
            save_file({"images": images}, path)
        command = ["purify", str(path), "--defense", "noise", "-o", str(tmp_path / f"out{n}{suffix}"), "-q"]
        done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 80
