"""Options for where and how to compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advdiff_cli.cli import options
from advdiff_cli.cli.parsers import BatchSize, ShardNumber
from advdiff_cli.data.distributed import world_size
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    import torch

    from advdiff_cli.data.rng import NoiseKind
    from advdiff_cli.models.precision import Precision
    from advdiff_cli.purification.defense import EvaluatedModel
    from advdiff_cli.purification.defense_spec import DefenseSpec, ModelSpec


NOTHING: Mapping[str, object] = MappingProxyType({})
"""The parameters of work that does not exist."""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how to compute."""

    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Read pickled weights; only for a source you trust.", rich_help_panel=options.COMPUTE
        ),
    ] = False
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], typer.Option(rich_help_panel=options.COMPUTE, help="Where to compute.")
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(
            rich_help_panel=options.COMPUTE,
            help="Of U-Nets and of training; auto: bf16 where the device has it, and fp32 for certify.",
        ),
    ] = "auto"

    def resolve_device(self) -> torch.device:
        """Return the device.

        Raises:
            AdvdiffError: The device is not available.
        """
        from advdiff_cli.models.device import resolve_device

        return resolve_device(self.device)

    def resolve_precision(self, device: torch.device, resume: Mapping[str, object] = NOTHING) -> Precision:
        """Return the precision; `auto` is that of the work that is resumed, if any, else the device's best."""
        from advdiff_cli.models.device import resolve_precision

        asked: Any = resume.get("precision", "auto") if self.precision == "auto" else self.precision
        return resolve_precision(asked, device)

    def known_precision(self, resume: Mapping[str, object]) -> Precision | None:
        """Return the precision, if it is known without asking a device for its best: asked for, or that of `resume`."""
        known: Any = resume.get("precision") if self.precision == "auto" else self.precision
        return known if self.device in ("auto", "cpu") and world_size() == 1 else None

    def noise_kind(self, resume: Mapping[str, object]) -> NoiseKind:
        """Return what draws the noise of a defense: as in the work that is resumed, if any, else as suits the device.

        Args:
            resume: The parameters of that work.

        Raises:
            AdvdiffError: The device is not available.
        """
        kind: NoiseKind = "philox"
        if resume:
            return kind if resume.get("noise") == kind else "numpy"
        return kind if self.device != "cpu" and self.resolve_device().type == "cuda" else "numpy"

    def find_model(
        self, classifier: str, defense: tuple[DefenseSpec, str | None] | None, resume: Mapping[str, object]
    ) -> ModelSpec | None:
        """Return what the results of a model depend on, or None if that is not known without loading the model.

        Raises:
            AdvdiffError: There is no such classifier.
        """
        from advdiff_cli.models.registry import classifier_fingerprint
        from advdiff_cli.purification.defense_spec import ModelSpec

        fingerprint, precision = classifier_fingerprint(classifier), self.known_precision(resume)
        if fingerprint is None or precision is None:
            return None
        return ModelSpec(fingerprint) if defense is None else ModelSpec(fingerprint, *defense, precision)

    def attack_precision(self, device: torch.device, resume: Mapping[str, object] = NOTHING) -> Precision:
        """Return the precision of an attacked purifier; `auto` is that of a resumed attack that computes it, if any.

        Raises:
            AdvdiffError: Gradients underflow at this precision.
        """
        from advdiff_cli.attacks.spec import AttackSpec

        if self.precision == "fp16":
            raise AdvdiffError("--precision fp16: gradients underflow; attack in bf16 or fp32")
        through = {"t_star", "method"} <= resume.keys() and AttackSpec.from_parameters(resume).computes_defense
        return self.resolve_precision(device, resume if through else NOTHING)

    def load_classifier(self, name: str, device: torch.device) -> EvaluatedModel:
        """Return a classifier without a defense.

        Raises:
            AdvdiffError: There is no such classifier.
        """
        from advdiff_cli.models.registry import load_frozen_classifier
        from advdiff_cli.purification.defense import EvaluatedModel

        return EvaluatedModel(*load_frozen_classifier(name, device, allow_pickle=self.allow_pickle))


@dataclass(frozen=True, kw_only=True)
class SeededComputeOptions(ComputeOptions):
    """Where and how to compute, with random streams."""

    seed: options.Seed = 0


@dataclass(frozen=True, kw_only=True)
class BatchedComputeOptions(SeededComputeOptions):
    """Where and how to compute, in batches."""

    batch_size: Annotated[
        BatchSize | None,
        typer.Option(
            parser=BatchSize,
            metavar="N|auto",
            rich_help_panel=options.COMPUTE,
            help="Patches computed together; auto: by cores and free memory.",
            show_default="32; purify, certify: 16; on CUDA 256",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ShardedSeededOptions(SeededComputeOptions):
    """Where and how to compute, with random streams, and which shard."""

    shard: Annotated[
        ShardNumber | None,
        typer.Option(
            parser=ShardNumber,
            metavar="I/N",
            help="Only part I of N, with I from 0; see merge.",
            rich_help_panel=options.ROWS,
        ),
    ] = None

    @property
    def shard_pair(self) -> tuple[int, int] | None:
        """The shard as (I, N), or None for everything."""
        return None if self.shard is None else self.shard.pair


@dataclass(frozen=True, kw_only=True)
class ShardedComputeOptions(ShardedSeededOptions, BatchedComputeOptions):
    """Where and how to compute, in batches, and which shard."""

    def refuse_auto_for_parts(self) -> None:
        """Refuse --batch-size auto for one part of many, since all parts must use the same batch size.

        Raises:
            AdvdiffError: It was given.
        """
        auto = self.batch_size is not None and self.batch_size.size is None
        if auto and (self.shard is not None or world_size() > 1):
            raise AdvdiffError("--batch-size auto: all parts of a result must use the same batch size; give a number")
