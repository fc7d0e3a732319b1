"""Results that are stored with their recipe and computed once: predictions (safetensors) and small results (JSON)."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.provenance import KEY, JsonObject, Provenance, canonical_json
from advdiff_cli.data.resume import matches_recipe
from advdiff_cli.evaluation.metrics import Predictions


def cached_predictions(path: Path, recipe: Provenance, *, overwrite: bool = False) -> Predictions | None:
    """Return the predictions that `recipe` stored at `path`, or None if there are none.

    The file is .safetensors and holds p1 (N, R), labels (N,) and index (N,).

    Raises:
        AdvdiffError: Predictions of another recipe are stored there and may not be replaced.
    """
    try:
        with safe_open(path, "numpy") as file:
            recorded = json.loads((file.metadata() or {}).get(KEY, "{}"))
            found = Predictions(file.get_tensor("labels"), file.get_tensor("p1"))
    except (OSError, SafetensorError, ValueError):
        return None
    return found if matches_recipe(path, recorded, recipe, overwrite=overwrite) else None


def recorded_recipe(path: Path) -> Provenance:
    """Return the recipe of the predictions at `path`; empty if there is none."""
    try:
        with safe_open(path, "numpy") as file:
            recorded: Provenance = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return recorded


def store_predictions(path: Path, recipe: Provenance, predictions: Predictions, index: NDArray[np.int64]) -> None:
    """Store predictions, with the index of each row, where `cached_predictions` finds them."""
    arrays = {"p1": predictions.p1, "labels": predictions.labels, "index": index}
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, {KEY: canonical_json(recipe)}))


def cached_result(path: Path, recipe: Provenance, *, overwrite: bool = False) -> JsonObject | None:
    """Return the result that `recipe` stored in the JSON file at `path`; as `cached_predictions`."""
    try:
        stored = json.loads(path.read_text())
        result, recorded = dict(stored["result"]), dict(stored["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if matches_recipe(path, recorded, recipe, overwrite=overwrite) else None


def store_result(path: Path, recipe: Provenance, result: Mapping[str, object]) -> None:
    """Store a result where `cached_result` finds it."""
    write_json(path, {"recipe": recipe, "result": result})


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file by atomic rename.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
