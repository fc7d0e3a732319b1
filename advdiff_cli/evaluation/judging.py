"""Predictions of a model on a patch set, kept in a file by their recipe."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.provenance import KEY, Provenance, canonical
from advdiff_cli.evaluation.metrics import Predictions, predict


def judged(
    model: nn.Module, patches: PatchSet, kept: Path, recipe: Provenance, device: torch.device,
    advance: Callable[[int], None], **judging: Any,
) -> Predictions:  # fmt: skip
    """Return the predictions on `patches`, from `kept` where it holds those of `recipe`, and kept there else.

    Args:
        model: A classifier or a defended one.
        patches: What is judged, with labels.
        kept: A .safetensors file: p1 (N, R), labels (N,), index (N,).
        recipe: Decides whether what is kept is up to date.
        device: Where to compute.
        advance: Called with the number of patches done.
        judging: As for `predict`.
    """
    labels = patches.require_labels()
    if (p1 := _load(kept, recipe)) is not None:
        advance(len(labels))
        return Predictions(labels, p1)
    done = []
    for batch in predict(model, patches, device, **judging):
        done.append(batch)
        advance(len(batch))
    p1 = np.concatenate(done)
    tensors = {"p1": p1, "labels": labels, "index": np.asarray(patches.index)}
    fresh = kept.with_name(kept.name + ".part")
    save_file(
        {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, fresh, {KEY: canonical(recipe)}
    )
    os.replace(fresh, kept)
    return Predictions(labels, p1)


def _load(kept: Path, recipe: Provenance) -> Any:
    try:
        with safe_open(kept, "numpy") as file:
            return file.get_tensor("p1") if (file.metadata() or {}).get(KEY) == canonical(recipe) else None
    except (OSError, SafetensorError):
        return None
