"""The settings of training that enter its recipe. They are known without loading a model."""

from dataclasses import asdict, dataclass
from typing import Literal

from advdiff_cli.attacks.spec import Norm
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.rng import NoiseKind
from advdiff_cli.models.precision import Precision


@dataclass(frozen=True)
class ClassifierRecipe:
    """The settings of a fit that enter the recipe.

    Args:
        epochs: Passes over the data.
        batch_size: Patches in a step, over all processes.
        learning_rate: Peak of the cosine cycle.
        weight_decay: Of AdamW.
        stain: Strength of stain variation; 0 for none.
        seed: Of weights, order and augmentation.
        precision: fp32, bf16 or fp16.
        noise: What draws the noise of purifiers and the starts of attacks.
        ema: Decay of the moving average of the weights, which is published; None to publish the weights themselves.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    stain: float
    seed: int
    precision: Precision
    noise: NoiseKind = "numpy"
    ema: float | None = None

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        return _parameters(self)


@dataclass(frozen=True)
class DdpmRecipe:
    """The settings of a fit that enter the recipe.

    Args:
        steps: Optimizer steps.
        batch_size: Patches in a step, over all processes.
        learning_rate: Peak of the cosine cycle.
        ema: Decay of the moving average of the weights.
        max_t: Highest trained noise level, as a fraction of T.
        seed: Of weights, order, augmentation and noise.
        precision: fp32, bf16 or fp16.
        noise: What draws the noise of the fit.
    """

    steps: int
    batch_size: int
    learning_rate: float
    ema: float
    max_t: float
    seed: int
    precision: Precision
    noise: NoiseKind = "numpy"

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        return _parameters(self)


def _parameters(fit: ClassifierRecipe | DdpmRecipe) -> JsonObject:
    return {k: v for k, v in asdict(fit).items() if v is not None and (k != "noise" or v != "numpy")}


@dataclass(frozen=True)
class Adversary:
    """The PGD attack of adversarial training, from a random start; its last iterate is trained on.

    The step size is 2.5 eps / steps (Madry et al. 2018), and at most 1.25 eps (Wong et al. 2020, arXiv:2001.03994).

    Args:
        eps: Radius of the ball in [0, 1] pixels; for l2, of what is read of a patch.
        steps: Gradient steps.
        loss: `madry` or `trades`.
        beta: In TRADES, the weight of the divergence between clean and attacked outputs.
        norm: Of the ball.
    """

    eps: float
    steps: int
    loss: Literal["madry", "trades"]
    beta: float = 6.0
    norm: Norm = "linf"

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        return {k: v for k, v in asdict(self).items() if k != "norm" or v != "linf"}

    @property
    def step_size(self) -> float:
        """The size of a step in [0, 1] pixels."""
        return self.eps * min(2.5 / self.steps, 1.25)
