"""The summary of a suite: its rows, the worst case and the sanity checks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.evaluation.comparison import difference_of_means
from advdiff_cli.evaluation.metrics import Predictions, vote_accuracies
from advdiff_cli.evaluation.statistics import mean_share
from advdiff_cli.robustness.binarization import BinarizationResult
from advdiff_cli.robustness.certified_accuracy import BrokenCertificates, CertifiedAccuracy
from advdiff_cli.robustness.gradient_checks import GradientFindings
from advdiff_cli.robustness.sanity_checks import NOT_TESTED, of_certificates, sanity_checks
from advdiff_cli.robustness.suite import CLEAN, SuiteRow
from advdiff_cli.robustness.worst_case import worst_case


def summarize(
    rows: Sequence[SuiteRow],
    judged: Mapping[str, Predictions],
    eps: float,
    gradients: GradientFindings | None = None,
    tested: BinarizationResult | None = None,
    certified: tuple[CertifiedAccuracy, BrokenCertificates] | None = None,
) -> JsonObject:
    """Return the summary of judged rows, `clean` among them, and of checks and certificates if they were made."""
    clean = judged["clean"]
    names, hardest = worst_case(rows, judged, eps)
    checks = sanity_checks(rows, judged, gradients, tested)
    if gradients and not tested:
        checks.append(NOT_TESTED)
    if certified is not None and (unbroken := of_certificates(certified[1], certified[0].alpha)):
        checks.append(unbroken)
    return {
        "n": len(clean.labels),
        "positive": int(clean.labels.sum()),
        "draws": clean.draws,
        "rungs": [summarize_row(r, judged[r.name], clean) for r in rows],
        "worst": {"of": names, **summarize_row(replace(CLEAN, name="worst"), hardest, clean)},
        "certified": certified and certified[0].summary(),
        "gradients": gradients and gradients.as_dict(),
        "unit_test": tested and tested.as_dict(),
        "alarms": [check.as_dict() for check in checks],
    }


def summarize_row(row: SuiteRow, found: Predictions, clean: Predictions) -> JsonObject:
    """Return the summary of a row: accuracy, votes, and the paired difference from the clean control."""
    control = clean.first_draws(found.draws)
    return {
        "name": row.name,
        "kind": row.kind,
        "attack": row.attack.parameters() if row.attack else {},
        **({} if row.after is None else {"after": row.after, "starts_there": row.starts_there}),
        "draws": found.draws,
        "accuracy": mean_share(found.share).as_dict(),
        **{k: v.as_dict() for k, v in vote_accuracies(found).items()},
        "clean": mean_share(control.share).as_dict(),
        "difference": difference_of_means(control, found).as_dict(),
    }
