"""What xPos is compared with: no positions, parts of `ScaleInvariant`, and rotary embedding stretched after training.

YAML names them by their import path: `positions: study.encodings.NoPositions`,
`distance_bias: {class_path: study.encodings.ALiBiScaleInvariant, init_args: {num_heads: 4}}`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.modes import Mode
from xpos_zoo import ALiBi, PositionModule, RotaryEmbedding, ScaleInvariant


class NoPositions(PositionModule):
    """No encoding at all: a causal model can still tell positions from how much each token sees."""

    def __init__(self, head_dim: int):
        super().__init__([0j] * (head_dim // 2))


class GainAlone(ScaleInvariant):
    """The gain of `ScaleInvariant` without its bias."""

    def __call__(self, distance: Tensor) -> Tensor:
        return torch.zeros_like(distance, dtype=torch.float32)


@dataclass(frozen=True)
class BiasAlone:
    """The bias of `ScaleInvariant` without its gain."""

    def __call__(self, distance: Tensor) -> Tensor:
        return ScaleInvariant()(distance)


@dataclass(frozen=True)
class ALiBiScaleInvariant(ScaleInvariant):
    """`ScaleInvariant` with ALiBi's bias."""

    num_heads: int = 1

    def __call__(self, distance: Tensor) -> Tensor:
        return super().__call__(distance) + ALiBi(self.num_heads)(distance)


def ntk_scaled(rotary: RotaryEmbedding, scale: float) -> PositionModule:
    """`rotary` with a base that stretches its slowest pair by `scale` and leaves its fastest alone ("NTK-aware").

    `scale` is context length over trained length; the base becomes base * scale^(d / (d - 2)).
    """
    slowest = max(1, len(rotary.rates) - 1)
    return PositionModule([rate * scale ** (-i / slowest) for i, rate in enumerate(rotary.rates)], rotary.interleaved)


@dataclass(frozen=True)
class ConstantScaling:
    """All queries times one factor."""

    factor: float

    def __call__(self, visible_keys: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.full_like(visible_keys, self.factor, dtype=dtype)


def yarn(
    rotary: RotaryEmbedding, scale: float, trained_length: int, alpha: float = 1.0, beta: float = 32.0
) -> tuple[PositionModule, ConstantScaling]:
    """`rotary` for `scale` times the trained length, without training (YaRN, Peng et al. 2023), and its query scaling.

    A pair that turns at least `beta` times over the trained length keeps its frequency, one that turns at most `alpha`
    times gets it divided by scale, and between them the two are mixed linearly. (Trained shorter than 2 pi beta = 201
    tokens, no pair turns that often, and even the fastest is stretched a little.)

    Logits are multiplied by (0.1 ln(scale) + 1)^2. The paper multiplies q and k by its root each; here q takes both.
    """
    turns = [trained_length * rate.imag / (2 * math.pi) for rate in rotary.rates]
    kept = [min(max((turn - alpha) / (beta - alpha), 0.0), 1.0) for turn in turns]
    stretched = [rate * (own + (1 - own) / scale) for rate, own in zip(rotary.rates, kept, strict=True)]
    return PositionModule(stretched, rotary.interleaved), ConstantScaling((0.1 * math.log(scale) + 1) ** 2)


def rescaled_modes(length: int) -> list[Mode]:
    """For RoPE alone: dense, with its angles rescaled to each context."""

    def by_yarn(rotary: RotaryEmbedding, scale: float) -> dict[str, Any]:
        return dict(zip(("positions", "query_scaling"), yarn(rotary, scale, length), strict=True))

    return [
        Mode("NTK", "dense, NTK-aware", rescale=lambda rotary, scale: {"positions": ntk_scaled(rotary, scale)}),
        Mode("YaRN", "dense, YaRN", rescale=by_yarn),
    ]
