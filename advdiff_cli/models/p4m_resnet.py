"""A residual network that answers alike for all eight symmetries of a patch: p4m_resnet15.

Group convolutions: Cohen and Welling 2016, arXiv:1602.07576. On PCam: Veeling et al. 2018, arXiv:1806.03962. A feature
map (B, 8 C, H, W) holds C channels in each of eight orientations; channel g C + c is channel c in orientation g.
Pooling by 2 takes the place of strides, which would break the symmetry on sides that are even.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, relu

P4M_RESNET15 = "p4m_resnet15"
ORIENTATIONS = 8

_STEM = (4, 8)
_STAGES = (8, 16, 32)
_BLOCKS = 2


def transform(images: Tensor, g: int) -> Tensor:
    """Return images (..., S, S) under symmetry g: g modulo 4 rotations by 90 degrees, then for g >= 4 a flip."""
    turned = torch.rot90(images, g % 4, (-2, -1))
    return turned.flip(-1) if g >= 4 else turned


def _quotients() -> Tensor:
    """Return a table (8, 8) whose entry h, k is the symmetry that, followed by h, gives k."""
    square = torch.arange(4).view(2, 2)
    table = torch.empty(ORIENTATIONS, ORIENTATIONS, dtype=torch.int64)
    for h in range(ORIENTATIONS):
        for j in range(ORIENTATIONS):
            both = transform(transform(square, j), h)
            k = next(k for k in range(ORIENTATIONS) if torch.equal(transform(square, k), both))
            table[h, k] = j
    return table


_QUOTIENTS = _quotients()


class GroupConv(nn.Module):
    """A convolution of feature maps (B, 8 C, H, W) over positions and orientations, or of images, which have one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, lifting: bool = False) -> None:
        """Take `inputs` channels in each orientation, or in all if `lifting`, to `outputs` in each; kernel is odd."""
        super().__init__()
        self.lifting = lifting
        fan_in = inputs if lifting else ORIENTATIONS * inputs
        self.weight = nn.Parameter(torch.empty(outputs, fan_in, kernel, kernel))
        nn.init.kaiming_normal_(self.weight)
        self._cached: tuple[tuple[int, torch.device], Tensor] | None = None

    def filters(self) -> Tensor:
        """Return the filters (8 outputs, orientations * inputs, k, k) of all output orientations."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            return self._expand()
        key = (self.weight._version, self.weight.device)
        if self._cached is None or self._cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # later passes may take gradients of the input
                self._cached = key, self._expand()
        return self._cached[1]

    def _expand(self) -> Tensor:
        if self.lifting:
            return torch.cat([transform(self.weight, h) for h in range(ORIENTATIONS)])
        outputs, fan_in, kernel, _ = self.weight.shape
        weight = self.weight.reshape(outputs, ORIENTATIONS, fan_in // ORIENTATIONS, kernel, kernel)
        return torch.cat([transform(weight[:, q].flatten(1, 2), h) for h, q in enumerate(_QUOTIENTS)])

    def forward(self, x: Tensor) -> Tensor:
        """Return feature maps of the same height and width."""
        return conv2d(x, self.filters(), padding=self.weight.shape[-1] // 2)


class GroupBatchNorm(nn.BatchNorm2d):
    """Batch normalization whose statistics and weights are those of a channel in all orientations."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize feature maps (B, 8 C, H, W)."""
        n, channels, height, width = x.shape
        wide = x.permute(0, 2, 3, 1).reshape(n, height, width * ORIENTATIONS, channels // ORIENTATIONS)
        out = super().forward(wide.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return out.reshape(n, height, width, channels).permute(0, 3, 1, 2)


class _Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = GroupConv(inputs, outputs, 3), GroupBatchNorm(outputs)
        self.conv2, self.bn2 = GroupConv(outputs, outputs, 3), GroupBatchNorm(outputs)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(GroupConv(inputs, outputs, 1), GroupBatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(inner + self.shortcut(x))


class P4mResNet(nn.Module):
    """p4m_resnet15: two convolutions and twelve in residual blocks, between which feature maps are pooled by 2."""

    def __init__(self, classes: int = 2) -> None:
        """Build it with random weights."""
        super().__init__()
        first, second = _STEM
        self.lift, self.bn1 = GroupConv(3, first, 5, lifting=True), GroupBatchNorm(first)
        self.conv, self.bn2 = GroupConv(first, second, 3), GroupBatchNorm(second)
        stages = [self._stage(*widths) for widths in pairwise((second, *_STAGES))]
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(_STAGES[-1], classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(_Block(inputs, outputs), *(_Block(outputs, outputs) for _ in range(_BLOCKS - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, S, S), where 16 divides S.

        Raises:
            ValueError: Images have other sides.
        """
        height, width = images.shape[-2:]
        if height != width or height % 16:
            raise ValueError(f"patches of {height}x{width} are not square, or 16 does not divide their side")
        x = relu(self.bn1(self.lift(images)))
        x = relu(self.bn2(self.conv(avg_pool2d(x, 2))))
        for stage in self.stages:
            x = stage(avg_pool2d(x, 2))
        pooled = x.mean((2, 3)).view(len(x), ORIENTATIONS, -1).mean(1)
        logits: Tensor = self.fc(pooled)
        return logits
