"""Bundling a trained model: the same folder with its weights stored in fp16, half the size."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def bundle(source: Path, target: Path) -> None:
    """Copy a model folder to `target` with floating-point weights stored in fp16; loading gives fp32 again.

    Args:
        source: A classifier or diffusion model folder.
        target: The folder to be made, e.g. advdiff_cli/weights/NAME.
    """
    shutil.copytree(source, target)
    for path in target.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        halves = {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
        save_file(halves, path, metadata)
        path.chmod(0o644)
