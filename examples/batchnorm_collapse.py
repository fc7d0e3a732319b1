"""Why the paper's adversarial training collapses to chance: its code trains on one patch at a time.

python examples/batchnorm_collapse.py CLASSIFIER VALID TEST [N]

The paper's code trains a GoogLeNet on 1,000 attacked patches, one at a time, with Adam at a learning rate of 1e-10. No
weight changes, but batch normalization replaces its running statistics by those of single patches. Here a classifier
is trained on the same N patches of VALID (default 1,000) one and 64 at a time, with and without a useful learning rate,
and with batch normalization frozen. Each is evaluated on N patches of TEST, clean and under PGD-10, l-inf 2/255.
"""

import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advdiff_cli import pgd
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patches import open_patches
from advdiff_cli.evaluation.statistics import Estimate, wilson
from advdiff_cli.models.classifiers import read_classifier
from advdiff_cli.models.registry import find_classifier
from advdiff_cli.training.adversarial import TrainingInput
from advdiff_cli.training.recipes import Adversary

EPS = 2 / 255
BATCH = 64  # of the evaluation
VARIANTS = {  # patches at a time, learning rate, whether batch normalization updates
    "one at a time, learning rate 1e-10 (the paper's)": (1, 1e-10, True),
    "64 at a time, learning rate 1e-10": (64, 1e-10, True),
    "one at a time, learning rate 1e-5": (1, 1e-5, True),
    "one at a time, learning rate 1e-5, batch norm frozen": (1, 1e-5, False),
}


def read(path: str, n: int) -> tuple[Tensor, Tensor]:
    """Return n patches (n, 3, 96, 96) in [0, 1], in a fixed random order, and their labels (n,)."""
    patches: PatchSet = open_patches(path)
    rows = np.sort(np.random.default_rng(0).permutation(len(patches))[:n])
    order = np.random.default_rng(1).permutation(len(rows))
    return patches.read(rows)[order], torch.from_numpy(patches.require_labels()[rows])[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, batch: int, rate: float, *, update: bool) -> None:
    """Train on each attacked patch once, as the paper does."""
    inputs = TrainingInput(adversary=Adversary(EPS, steps=5, loss="madry"))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for first in range(0, len(images), batch):
        rows = range(first, min(first + batch, len(images)))
        adv = inputs.perturb(model, images[rows], labels[rows], rows)  # in eval mode
        model.train(update)
        optimizer.zero_grad()
        cross_entropy(model(adv), labels[rows]).backward()
        optimizer.step()
    model.eval()


def judge(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Estimate, Estimate]:
    """Return the accuracy on clean patches, and under PGD."""
    model.requires_grad_(requires_grad=False)
    correct = {"clean": 0, "attacked": 0}
    for first in range(0, len(images), BATCH):
        rows = range(first, min(first + BATCH, len(images)))
        x, y = images[rows], labels[rows]
        for name, x_in in (("clean", x), ("attacked", pgd(model, x, y, eps=EPS, steps=10, rows=rows))):
            with torch.inference_mode():
                correct[name] += int((model(x_in).argmax(1) == y).sum())
    return wilson(correct["clean"], len(images)), wilson(correct["attacked"], len(images))


def main(classifier: str, valid: str, test: str, n: int = 1000) -> None:
    """Print the table."""
    training, evaluation = read(valid, n), read(test, n)
    print(f"{'% [95 %]':58}{'clean':>20}{'attacked':>20}")
    for name, variant in {"unchanged": None, **VARIANTS}.items():
        model = read_classifier(find_classifier(classifier))
        if variant is not None:
            batch, rate, update = variant
            train(model, *training, batch, rate, update=update)
        clean, attacked = judge(model, *evaluation)
        print(f"{name:58}{clean!s:>20}{attacked!s:>20}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
