"""The summary of certificates: the accuracy that is proved at each radius."""

from collections.abc import Sequence
from dataclasses import dataclass

from advdiff_cli.certification.bounds import linf_as_l2
from advdiff_cli.certification.certificate import CertifiedSet
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.evaluation.statistics import wilson


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


def summarize(found: CertifiedSet, radii: Sequence[Radius]) -> JsonObject:
    """Return vote accuracy, abstentions and draws, and the share that is certified at each radius, with intervals.

    Without labels there is no vote accuracy, and a share counts certificates of any class.
    """
    n = len(found)
    certified = [
        {"norm": r.norm, "eps": r.eps, "l2": r.l2} | wilson(int(found.certified(r.l2).sum()), n).as_dict()
        for r in radii
    ]
    return {
        "n": n,
        "draws": int(found.draws.sum()),
        "seconds": round(float(found.seconds.sum()), 1),
        "vote_accuracy": None if found.labels is None else wilson(int(found.voted.sum()), n).as_dict(),
        "abstained": int(found.abstain.sum()),
        "certified": certified,
    }
