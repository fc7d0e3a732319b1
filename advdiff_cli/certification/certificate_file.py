"""The table of certificates, one line for each patch, and its form for other tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.certification.bounds import round_down
from advdiff_cli.certification.certificate import Certificate
from advdiff_cli.data.patch_source import RowFingerprints
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.row_fingerprints import as_text, from_texts
from advdiff_cli.data.table_writer import read_csv, recorded_table
from advdiff_cli.errors import AdvdiffError

HEADER = ("name", "index", "label", "decision", "abstain", "radius", "draws", "successes", "seconds", "sha256")
_TSV = ("idx", "label", "predict", "radius", "correct", "time")
_TSV_DIGITS = 6
_LONGEST_HEADER = 200  # characters


@dataclass(frozen=True)
class CertifiedSet:
    """The certificates of a set of patches.

    Args:
        names: The name of each patch.
        index: (N,) the row of each patch in the origin set.
        labels: (N,), or None.
        decision: (N,) classes.
        abstain: (N,) whether the decision is not proved.
        radius: (N,) in l2, of the whole patch.
        draws: (N,) draws that were spent.
        seconds: (N,) spent on each patch.
        fingerprints: (N, 32) of each patch, which its certificate is of.
    """

    names: Sequence[str]
    index: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    decision: NDArray[np.int64]
    abstain: NDArray[np.bool_]
    radius: NDArray[np.float64]
    draws: NDArray[np.int64]
    seconds: NDArray[np.float64]
    fingerprints: RowFingerprints

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: NDArray[np.int64]) -> "CertifiedSet":
        """Return the certificates at some positions."""
        labels = None if self.labels is None else self.labels[rows]
        names, index, fingerprints = [self.names[int(i)] for i in rows], self.index[rows], self.fingerprints[rows]
        decision, abstain, radius = self.decision[rows], self.abstain[rows], self.radius[rows]
        draws, seconds = self.draws[rows], self.seconds[rows]
        return CertifiedSet(names, index, labels, decision, abstain, radius, draws, seconds, fingerprints)

    @property
    def voted(self) -> NDArray[np.bool_]:
        """Whether each decision is that of the label (N,); without labels, whether there is one."""
        return ~self.abstain if self.labels is None else np.equal(self.decision, self.labels)

    def certified(self, radius: float) -> NDArray[np.bool_]:
        """Return whether each patch is certified at an l2 radius, for its label if there is one (N,)."""
        proved: NDArray[np.bool_] = self.voted & ~self.abstain & (self.radius >= radius)
        return proved


def line(
    name: str, index: int, label: int | None, found: Certificate, seconds: float, fingerprint: NDArray[np.uint8]
) -> list[str]:
    """Return the cells of a patch."""
    known = "" if label is None else str(label)
    decided = (str(found.decision), str(int(found.abstain)), repr(found.radius))
    counts = (str(found.draws), str(found.successes), f"{seconds:.3f}")
    return [name, str(index), known, *decided, *counts, as_text(fingerprint)]


def read_certificates(path: Path) -> CertifiedSet:
    """Return the certificates in a table of `certify`.

    Raises:
        AdvdiffError: There is no such table, or it is damaged.
    """
    if not path.is_file():
        raise AdvdiffError(f"no such file: {path}")
    try:
        header, lines = read_csv(path)
        if tuple(header) != HEADER:
            raise AdvdiffError(f"{path} is not a table of certificates: make one with advdiff certify -o {path}")
        names, index, labels, decision, abstain, radius, draws, _, seconds, sha256 = zip(*lines, strict=True)
        fingerprints = from_texts(sha256)
        known = None if "" in labels else np.array(labels, np.int64)
        whole = [np.array(column, np.int64) for column in (index, decision, abstain, draws)]
        real = [np.array(column, np.float64) for column in (radius, seconds)]
    except (ValueError, UnicodeDecodeError):
        raise AdvdiffError(f"{path} is damaged: make it again with advdiff certify -o {path}") from None
    return CertifiedSet(names, whole[0], known, whole[1], whole[2] == 1, real[0], whole[3], real[1], fingerprints)


def certificate_provenance(path: Path) -> Provenance:
    """Return how a table of certificates was made.

    Raises:
        AdvdiffError: It was changed since it was written.
    """
    if not path.is_file():
        raise AdvdiffError(f"no such file: {path}")
    made = recorded_table(path)
    if made is None or made["recipe"]["command"] != "certify":
        raise AdvdiffError(f"{path} is not as advdiff certify wrote it, or its record is missing; make it again")
    return made


def is_certificate_table(path: Path) -> bool:
    """Return whether a file begins like a table of certificates."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(_LONGEST_HEADER).strip().split(",") == list(HEADER)
    except OSError:
        return False


def write_tsv(path: Path, found: CertifiedSet) -> None:
    """Write certificates in the columns of Cohen et al.'s certify.py, which analyses of other tools read.

    A patch that abstains has prediction -1 and radius 0. Radii are rounded down.

    Raises:
        AdvdiffError: There are no labels.
    """
    if found.labels is None:
        raise AdvdiffError(f"--tsv {path}: the table of other tools needs labels; give --labels FILE.csv")
    with path.open("w", encoding="utf-8") as file:
        file.write("\t".join(_TSV) + "\n")
        for i in range(len(found)):
            decision = -1 if found.abstain[i] else int(found.decision[i])
            radius = 0.0 if found.abstain[i] else round_down(float(found.radius[i]), _TSV_DIGITS)
            correct = int(decision == found.labels[i])
            cells = (found.index[i], found.labels[i], decision, radius, correct, _clock(float(found.seconds[i])))
            file.write("\t".join(map(str, cells)) + "\n")


def _clock(seconds: float) -> str:
    """Return a duration as Python prints a timedelta: 0:00:17.250000."""
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02}:{rest:09.6f}"
