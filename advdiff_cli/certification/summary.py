"""The summary of certificates: the accuracy that is proved at each radius."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advdiff_cli.certification.bounds import linf_as_l2
from advdiff_cli.certification.certificate_file import (
    CertifiedSet,
    certificate_provenance,
    read_certificates,
)
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.statistics import wilson

EPS = (0.5 / 255, 1 / 255, 2 / 255)
RADII = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Radius:
    """A size of attacks.

    Args:
        norm: linf or l2.
        eps: In that norm, in [0, 1] pixels; for l2, of the whole patch.
        l2: The radius of the l2 ball that holds all these attacks on what the classifier reads.
    """

    norm: str
    eps: float
    l2: float

    @classmethod
    def linf(cls, eps: float, dimension: int) -> "Radius":
        """Return the size of l-inf attacks on `dimension` values."""
        return cls("linf", eps, linf_as_l2(eps, dimension))

    def describe(self) -> str:
        """Describe the size in a few words."""
        return f"l-inf {self.eps * 255:g}/255" if self.norm == "linf" else f"l2 {self.eps:g}"


def certified_curve(found: CertifiedSet) -> list[JsonObject]:
    """Return the certified accuracy with its interval at each radius where it falls, from 0 on."""
    radii = np.unique(found.radius[found.voted & ~found.abstain])
    n = len(found)
    return [{"l2": float(r), **wilson(int(found.certified(float(r)).sum()), n).as_dict()} for r in (0.0, *radii)] + [
        {"l2": float(np.nextafter(radii.max(initial=0.0), np.inf)), **wilson(0, n).as_dict()}
    ]


def told_sizes(parameters: Mapping[str, Any]) -> list[Radius]:
    """Return the sizes that a table of certificates decides, given the parameters of its recipe.

    Where exactly n draws allow any size, they are 0.5, 1 and 2/255 in l-inf, and 0.25, 0.5 and 1 in l2.
    """
    eps, radii = parameters["eps"], parameters["radii"]
    if not eps and not radii:
        eps, radii = EPS, RADII
    return [
        *(Radius.linf(e, parameters["dimension"]) for e in sorted(eps)),
        *(Radius("l2", r, r) for r in sorted(radii)),
    ]


def certificate_curves(path: Path) -> JsonObject:
    """Return what a report shows of a table of certificates: its summary, its curve, and its recipe.

    Raises:
        AdvdiffError: As `certified_set`.
    """
    made, found = certificate_provenance(path), read_certificates(path)
    _require_labels(path, found)
    parameters = made["recipe"]["parameters"]
    figures = summarize(found, told_sizes(parameters))
    figures |= {"alpha": parameters["alpha"], "sigma": parameters["sigma"], "recipe": made["recipe"]}
    if parameters["eps"] or parameters["radii"]:  # between and beyond the sizes, draws stopped before they could prove
        return {**figures, "steps": False, "curve": sorted(figures["certified"], key=lambda point: point["l2"])}
    return {**figures, "steps": True, "curve": certified_curve(found)}


def _require_labels(path: Path, found: CertifiedSet) -> None:
    if found.labels is None:
        raise AdvdiffError(f"{path} has no labels, so that nothing is right or wrong; certify with --labels FILE.csv")


def certified_set(path: Path, norm: str, eps: float) -> EvaluatedSet:
    """Return the patches of a table of certificates, each counted as right if that is proved at a size.

    Args:
        path: The table.
        norm: linf or l2.
        eps: The size.

    Raises:
        AdvdiffError: There is no such table, it was changed, or it has no labels.
    """
    made, found = certificate_provenance(path), read_certificates(path)
    _require_labels(path, found)
    assert found.labels is not None
    parameters = made["recipe"]["parameters"]
    decided = {"linf": parameters["eps"], "l2": parameters["radii"]}
    if any(decided.values()) and eps not in decided[norm]:
        size = f"--eps {eps * 255:g}/255" if norm == "linf" else f"--radius {eps:g}"
        raise AdvdiffError(f"{path} does not decide {size}: its draws stopped at other sizes; certify with it too")
    radius = linf_as_l2(eps, parameters["dimension"]) if norm == "linf" else eps
    right = found.certified(radius)
    p1 = np.where(right, found.labels, 1 - found.labels).astype(np.float64)
    return EvaluatedSet("certified", found.fingerprints, found.index, Predictions(found.labels, p1))


def summarize(found: CertifiedSet, radii: Sequence[Radius]) -> JsonObject:
    """Return vote accuracy, abstentions and draws, and the share that is certified at each radius, with intervals.

    `draws_range` is of one patch, from the fewest to the most. Without labels there is no vote accuracy, and a share
    counts certificates of any class.
    """
    n = len(found)
    certified = [
        {"norm": r.norm, "eps": r.eps, "l2": r.l2} | wilson(int(found.certified(r.l2).sum()), n).as_dict()
        for r in radii
    ]
    return {
        "n": n,
        "draws": int(found.draws.sum()),
        "draws_range": [int(found.draws.min()), int(found.draws.max())],
        "seconds": round(float(found.seconds.sum()), 1),
        "vote_accuracy": None if found.labels is None else wilson(int(found.voted.sum()), n).as_dict(),
        "abstained": int(found.abstain.sum()),
        "certified": certified,
    }
