"""Copy a trained model folder with its weights in fp16, half the size; loading converts them to fp32.

Example: python scripts/bundle_weights.py ddpm advdiff_cli/weights/pcam-ddpm
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def bundle(source: Path, target: Path) -> None:
    """Copy a classifier or diffusion model folder to `target`, which must not exist."""
    shutil.copytree(source, target)
    for path in target.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        halves = {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
        save_file(halves, path, metadata)
        path.chmod(0o644)


if __name__ == "__main__":
    bundle(Path(sys.argv[1]), Path(sys.argv[2]))
