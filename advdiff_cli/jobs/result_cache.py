"""What is derived from patch sets and kept beside them by its recipe: predictions, and small results as JSON."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from advdiff_cli.data.atomic_files import replacing, writing
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.provenance import KEY, Provenance, canonical, difference, same_recipe
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.metrics import Predictions, predict


def kept_predictions(kept: Path, recipe: Provenance, *, overwrite: bool = False) -> Predictions | None:
    """Return the predictions that `recipe` left at `kept`, a .safetensors file: p1 (N, R), labels (N,), index (N,).

    None where there are none; AdvdiffError where others stand there that may not be replaced.
    """
    try:
        with safe_open(kept, "numpy") as file:
            standing = json.loads((file.metadata() or {}).get(KEY, "{}"))
            found = Predictions(file.get_tensor("labels"), file.get_tensor("p1"))
    except (OSError, SafetensorError, ValueError):
        return None
    return found if _is_of(kept, standing, recipe, overwrite) else None


def recorded_recipe(kept: Path) -> Provenance:
    """Return the recipe of the predictions at `kept`; empty where there is none."""
    try:
        with safe_open(kept, "numpy") as file:
            made: Provenance = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return made


def predict_and_keep(
    model: nn.Module, patches: PatchSet, kept: Path, recipe: Provenance, device: torch.device,
    advance: Callable[[int], None], **judging: Any,
) -> Predictions:  # fmt: skip
    """Return the predictions on `patches`, which have labels, and keep them.

    Args:
        model: A classifier or a defended one.
        patches: What is judged.
        kept: Where `kept_predictions` finds them.
        recipe: What made them.
        device: Where to compute.
        advance: Called with the number of patches done.
        judging: As for `predict`.
    """
    labels, done = patches.require_labels(), []
    for batch in predict(model, patches, device, **judging):
        done.append(batch)
        advance(len(batch))
    p1 = np.concatenate(done)
    tensors = {"p1": p1, "labels": labels, "index": np.asarray(patches.index)}
    with replacing(kept) as fresh, writing(kept):
        save_file(
            {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, fresh, {KEY: canonical(recipe)}
        )
    return Predictions(labels, p1)


def kept_result(kept: Path, recipe: Provenance, *, overwrite: bool = False) -> dict[str, Any] | None:
    """Return the result that `recipe` left at `kept`, a JSON file; as `kept_predictions`."""
    try:
        standing = json.loads(kept.read_text())
        result, made_by = dict(standing["result"]), dict(standing["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if _is_of(kept, made_by, recipe, overwrite) else None


def keep_result(kept: Path, recipe: Provenance, result: Mapping[str, Any]) -> None:
    """Keep a result where `kept_result` finds it."""
    write_json(kept, {"recipe": recipe, "result": result})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file by atomic rename; NaN is an error."""
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _is_of(kept: Path, standing: Provenance, recipe: Provenance, overwrite: bool) -> bool:
    if not same_recipe(standing, recipe) and not overwrite:
        what = difference(standing, recipe)
        raise AdvdiffError(f"{kept} was made otherwise ({what}); give --overwrite or another --out")
    return same_recipe(standing, recipe)
