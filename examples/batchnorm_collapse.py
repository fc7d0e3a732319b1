"""Why the paper's adversarial training collapses to chance: its code learns from one patch at a time.

python examples/batchnorm_collapse.py CLASSIFIER VALID TEST [N]

The paper's code shows a GoogLeNet 1,000 attacked patches, one at a time, in training mode, with Adam at a learning rate
of 1e-10: no weight moves, but batch normalisation replaces its running statistics by those of single patches. Here a
classifier is shown the same N patches of VALID (default 1,000) one and 64 at a time, with and without learning, and
with batch normalisation as it was; each is then judged on N patches of TEST, clean and under PGD-10, l-inf 2/255.
"""

import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advdiff_cli.attacks import pgd
from advdiff_cli.data.patches import PatchSet, open_patches
from advdiff_cli.evaluation.statistics import Estimate, wilson
from advdiff_cli.models.classifiers import load_classifier
from advdiff_cli.models.registry import find_classifier
from advdiff_cli.training.adversarial import Adversary, TrainingInput

EPS = 2 / 255
BATCH = 64  # of the judging
VARIANTS = {  # patches at a time, learning rate, whether batch normalisation follows the patches
    "one at a time, learning rate 1e-10 (the paper's)": (1, 1e-10, True),
    "64 at a time, learning rate 1e-10": (64, 1e-10, True),
    "one at a time, learning rate 1e-5": (1, 1e-5, True),
    "one at a time, learning rate 1e-5, batch norm as it was": (1, 1e-5, False),
}


def read(path: str, n: int) -> tuple[Tensor, Tensor]:
    """Return n patches (n, 3, 96, 96) in [0, 1], in a fixed random order, and their labels (n,)."""
    whole: PatchSet = open_patches(path)
    rows = np.sort(np.random.default_rng(0).permutation(len(whole))[:n])
    order = np.random.default_rng(1).permutation(len(rows))
    return whole.read(rows)[order], torch.from_numpy(whole.require_labels()[rows])[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, batch: int, rate: float, *, follow: bool) -> None:
    """Learn from attacked patches alone, once each, as the paper does."""
    regime = TrainingInput(adversary=Adversary(EPS, steps=5, loss="madry"))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for first in range(0, len(images), batch):
        rows = range(first, min(first + batch, len(images)))
        adv = regime.perturb(model, images[rows], labels[rows], rows)  # in eval mode
        model.train(follow)
        optimizer.zero_grad()
        cross_entropy(model(adv), labels[rows]).backward()
        optimizer.step()
    model.eval()


def judge(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Estimate, Estimate]:
    """Return the accuracy on clean patches, and under PGD."""
    model.requires_grad_(requires_grad=False)
    right = {"clean": 0, "attacked": 0}
    for first in range(0, len(images), BATCH):
        rows = range(first, min(first + BATCH, len(images)))
        x, y = images[rows], labels[rows]
        for name, shown in (("clean", x), ("attacked", pgd(model, x, y, eps=EPS, steps=10, rows=rows))):
            with torch.inference_mode():
                right[name] += int((model(shown).argmax(1) == y).sum())
    return wilson(right["clean"], len(images)), wilson(right["attacked"], len(images))


def main(classifier: str, valid: str, test: str, n: int = 1000) -> None:
    """Print the table."""
    shown, judged = read(valid, n), read(test, n)
    print(f"{'% [95 %]':58}{'clean':>20}{'attacked':>20}")
    for name, variant in {"as it was": None, **VARIANTS}.items():
        model = load_classifier(find_classifier(classifier))
        if variant is not None:
            batch, rate, follow = variant
            train(model, *shown, batch, rate, gradient_model=follow)
        clean, attacked = judge(model, *judged)
        print(f"{name:58}{clean!s:>20}{attacked!s:>20}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
