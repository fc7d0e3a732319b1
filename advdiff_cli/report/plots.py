"""Plots: patches in stages, sweeps, accuracies, and suites of attacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from torch import Tensor

mpl.use("Agg")  # without a display
from matplotlib import pyplot as plt

from advdiff_cli.data.atomic_files import atomic_write

mpl.rcParams["svg.fonttype"] = "none"  # keep text as text, for search, screen readers and the page's colors
mpl.rcParams["svg.hashsalt"] = "advdiff"  # makes ids in SVG files deterministic


@dataclass(frozen=True)
class Column:
    """One stage of each patch: images (B, 3, H, W) in [0, 1] and, if judged, the probabilities of the true class."""

    title: str
    images: Tensor
    confidence: Sequence[float] | None = None


def amplified(images: Tensor, reference: Tensor, eps: float) -> Tensor:
    """Return the difference (B, 3, H, W): gray is no difference, eps in [0, 1] pixels is full contrast."""
    return ((images - reference) / (2 * eps) + 0.5).clamp(0, 1)


def panel(columns: Sequence[Column], row_names: Sequence[str], path: Path) -> None:
    """Draw patches as rows and stages as columns, with the probability of the true class below each image.

    A probability below one half, a wrong decision, is red.
    """
    rows, side = len(row_names), 1.45
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(side * len(columns) + 0.6, (side + 0.28) * rows + 0.5), squeeze=False, dpi=150
    )
    for j, column in enumerate(columns):
        axes[0, j].set_title(column.title, fontsize=8)
        for i in range(rows):
            axis = axes[i, j]
            axis.imshow(np.asarray(column.images[i].permute(1, 2, 0)), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if column.confidence is not None:
                confidence = column.confidence[i]
                color = "#b2182b" if confidence < 0.5 else "#1b6e3c"
                axis.set_xlabel(f"p(true) {confidence:.2f}", fontsize=7, color=color, labelpad=2)
    for i, name in enumerate(row_names):
        axes[i, 0].set_ylabel(name, fontsize=7)
    figure.tight_layout(pad=0.4, h_pad=0.6, w_pad=0.3)
    _save(figure, [path])


_LETTERS_PER_INCH = 13  # in titles
STANDARD, ROBUST, CERTIFIED, PLAIN = "#2166ac", "#b2182b", "#1b6e3c", "#666666"
WORST = "#010101"  # not black, which an SVG leaves out, so that the page's colors could not replace it
_SERIES = (CERTIFIED, STANDARD, "#7b3294", "#b35806", "#666666")  # of certificates


def sweep_curves(result: Mapping[str, Any], axis: str, paths: Sequence[Path]) -> None:
    """Draw both accuracies of a sweep over its values, with intervals as bands and the chosen value marked.

    Args:
        result: The content of sweep.json.
        axis: Label of the value axis.
        paths: Files, png or svg.
    """
    rows = result["rows"]
    x = [row["value"] for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 3.9), dpi=150, layout="constrained")
    certified = [("certified", CERTIFIED)] if all(row.get("certified") for row in rows) else []
    for name, color in (("standard", STANDARD), ("robust", ROBUST), *certified):
        low, value, high = ([100 * row[name][k] for row in rows] for k in ("low", "value", "high"))
        axes.plot(x, value, color=color, marker="o", markersize=3.5, label=f"{name} accuracy")
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    axes.axhline(100 * result["undefended"]["value"], color=STANDARD, linestyle=":", label="undefended, standard")
    if all(row["undefended_robust"] for row in rows):
        blind = [100 * row["undefended_robust"]["value"] for row in rows]
        axes.plot(x, blind, color=ROBUST, linestyle=":", label="undefended, robust")
    for row in rows:
        if row["name"] == result["chosen"]:
            axes.axvline(row["value"], color=PLAIN, linewidth=0.8, linestyle="--", label=f"chosen: {row['value']:g}")
    if min(x) > 0 and max(x) / min(x) > 8:
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{v:g}" for v in x], rotation=45, fontsize=7)
        axes.minorticks_off()
    axes.set(xlabel=axis, ylabel="accuracy, %", ylim=(0, 100))
    axes.grid(alpha=0.25)
    axes.set_title(
        fill(plain(f"n = {result['n']}; {result['attack_told']}"), round(6.4 * _LETTERS_PER_INCH)), fontsize=8
    )
    figure.legend(fontsize=7, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, paths)


def accuracy_bars(rows: Sequence[Mapping[str, Any]], note: str, paths: Sequence[Path]) -> None:
    """Draw standard and robust accuracies side by side, with their intervals (the paper's Figure 3).

    Args:
        rows: Each with name, n, standard and robust; estimates as in JSON.
        note: The attack, for the title.
        paths: Files, png or svg.
    """
    width = min(max(1.5 + 1.35 * len(rows), 4.5), 10)
    figure, axes = plt.subplots(figsize=(width, 3.9), dpi=150, layout="constrained")
    for shift, (name, color) in zip((-0.2, 0.2), (("standard", STANDARD), ("robust", ROBUST)), strict=True):
        value = np.array([100 * row[name]["value"] for row in rows])
        low, high = (np.array([100 * row[name][k] for row in rows]) for k in ("low", "high"))
        places = np.arange(len(rows)) + shift
        axes.bar(places, value, 0.38, color=color, label=f"{name} accuracy")
        axes.errorbar(places, value, [value - low, high - value], fmt="none", ecolor="black", capsize=3, linewidth=0.9)
        for x, v, top in zip(places, value, high, strict=True):
            axes.text(x, top + 1.5, f"{v:.1f}", ha="center", fontsize=7)
    names = [
        f"{fill(plain(row['name']), 13, break_long_words=False, break_on_hyphens=False)}\nn = {row['n']}"
        for row in rows
    ]
    axes.set_xlim(-max(0.6, 1.5 / len(rows)), len(rows) - 1 + max(0.6, 1.5 / len(rows)))
    axes.set_xticks(np.arange(len(rows)), names, fontsize=8)
    axes.set(ylabel="accuracy, % [95 %]", ylim=(0, 105))
    axes.set_title(fill(plain(note), round(_LETTERS_PER_INCH * width)), fontsize=8)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, paths)


def certified_curves(
    tables: Mapping[str, Mapping[str, Any]], attacks: Sequence[Mapping[str, Any]], paths: Sequence[Path]
) -> None:
    """Draw the accuracy that is certified over the l2 radius, and above it what attacks of each radius leave.

    Args:
        tables: By name; each with n, and curve: radii, and the certified accuracy with its interval at each; they are
            where the accuracy steps down, or the sizes that were decided.
        attacks: Each with name, l2 and accuracy; an estimate as in JSON.
        paths: Files, png or svg.
    """
    figure, axes = plt.subplots(figsize=(6.4, 3.9), dpi=150, layout="constrained")
    for (name, table), color in zip(tables.items(), cycle(_SERIES), strict=False):
        radii = [p["l2"] for p in table["curve"]]
        low, value, high = ([100 * p[k] for p in table["curve"]] for k in ("low", "value", "high"))
        name = plain(f"{name}: certified (n = {table['n']})")
        if table["steps"]:
            axes.step(radii, value, where="pre", color=color, label=name)
            axes.fill_between(radii, low, high, step="pre", color=color, alpha=0.15, linewidth=0)
        else:
            bars = [np.subtract(value, low), np.subtract(high, value)]
            axes.errorbar(radii, value, bars, fmt="o:", color=color, markersize=3.5, linewidth=0.8, label=name)
    for k, attack in enumerate(attacks):
        estimate = attack["accuracy"]
        value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
        label = "under attack, vote" if k == 0 else None
        bars = [[value - low], [high - value]]
        axes.errorbar(attack["l2"], value, bars, fmt="v", color=ROBUST, markersize=4, linewidth=0.8, label=label)
    axes.set(xlabel="l2 radius, of the whole patch", ylabel="accuracy, %", ylim=(0, 100))
    largest = max(point["l2"] for table in tables.values() for point in table["curve"])
    axes.set_xlim(0, 2 * largest or 1)  # attacks far beyond leave nothing to see
    axes.grid(alpha=0.25)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, paths)


def suite_bars(result: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draw the accuracy under each row of a suite (robustness.json), and the worst case last."""
    rows = [*result["rungs"], result["worst"]]
    kinds = {
        "control": (STANDARD, "no attack, or chance"),
        "white-box": (ROBUST, "white-box"),
        "black-box": ("#67a9cf", "blind, transferred or black-box"),
        "check": (PLAIN, "check of the suite"),
        "curve": ("#ef8a62", "other sizes"),
        "worst": (WORST, "worst for each patch"),
    }
    figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.27 * len(rows)), dpi=150, layout="constrained")
    for i, row in enumerate(rows):
        estimate, (color, label) = row["accuracy"], kinds["worst" if row is rows[-1] else row["kind"]]
        value, low, high = (100 * estimate[k] for k in ("value", "low", "high"))
        first = label not in axes.get_legend_handles_labels()[1]
        axes.barh(i, value, 0.7, color=color, alpha=0.85, label=label if first else None)
        axes.errorbar(
            value, i, xerr=[[value - low], [high - value]], fmt="none", ecolor="gray", capsize=2, linewidth=0.9
        )
        axes.text(high + 1, i, f"{value:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [plain(row["name"]) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, % [95 %]", xlim=(0, 105))
    draws = f", {result['draws']} draws" if result["draws"] > 1 else ""
    axes.set_title(f"n = {result['n']}{draws}, eps {result['eps'] * 255:g}/255", fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, paths)


def plain(text: str) -> str:
    """Return text that matplotlib shows as it is: a dollar would begin a formula, and fonts lack control characters."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def _save(figure: Any, paths: Sequence[Path]) -> None:
    """Write a figure to each path by atomic rename; without dates, so that files are deterministic."""
    for path in paths:
        dated = {"Date": None} if path.suffix == ".svg" else {}
        with atomic_write(path) as temporary:
            figure.savefig(temporary, metadata=dated)
    plt.close(figure)
