"""What xPos is compared with: other ways to tell positions, and rotary embedding stretched after training.

YAML names them by their import path: `positions: {class_path: study.encodings.ALiBi, init_args: {num_heads: 4}}`.
Axes: h heads, n queries, m keys.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from train.modes import Mode
from xpos_zoo import XPOS, PositionModule, RotaryEmbedding, ScaleInvariant
from xpos_zoo.checks import require_sizes


class NoPositions(PositionModule):
    """No encoding at all: a causal model can still tell positions from how much each token sees."""

    def __init__(self, head_dim: int):
        super().__init__([0j] * (head_dim // 2))


class ALiBi(NoPositions):
    """Attention with linear biases (Press et al. 2022): head h's logits fall by slope_h a position of distance.

    `num_heads` is the model's own; ValueError if it is not positive.
    """

    def __init__(self, head_dim: int, *, num_heads: int):
        require_sizes(num_heads=num_heads)
        super().__init__(head_dim)
        self.num_heads = num_heads

    def distance_bias(self, distance: Tensor) -> Tensor:
        """What is added to logits at each distance (..., n, m): (..., h, n, m), float32."""
        return -rearrange(alibi_slopes(self.num_heads, distance.device), "h -> h 1 1") * distance


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """2^(-8k/h) for heads k = 1 .. h if h is a power of two, (h,), float32.

    Otherwise, as published, those of the power of two below h, then every other one of the power of two above it.
    """
    below = 2 ** (num_heads.bit_length() - 1)
    own = torch.arange(1, below + 1, dtype=torch.float32, device=device)
    between = torch.arange(num_heads - below, dtype=torch.float32, device=device) + 0.5
    return torch.exp2(torch.cat((own, between)) * (-8 / below))


class PartOfScaleInvariant(XPOS):
    """xPos with one half of `ScaleInvariant`: `part` is "gain" or "bias"."""

    def __init__(self, head_dim: int, scale_base: float = 512, *, max_wavelength: float, part: Literal["gain", "bias"]):
        super().__init__(head_dim, scale_base, max_wavelength=max_wavelength)
        self.distance_bias = Gain() if part == "gain" else ScaleInvariant().__call__


class Gain(ScaleInvariant):
    """The gain of `ScaleInvariant` without its bias."""

    def __call__(self, distance: Tensor) -> Tensor:
        return torch.zeros_like(distance, dtype=torch.float32)


def ntk_scaled(rotary: RotaryEmbedding, scale: float) -> PositionModule:
    """`rotary` with a base that stretches its slowest pair by `scale` and leaves its fastest alone ("NTK-aware").

    `scale` is context length over trained length; the base becomes base * scale^(d / (d - 2)).
    """
    slowest = max(1, len(rotary.rates) - 1)
    return PositionModule([rate * scale ** (-i / slowest) for i, rate in enumerate(rotary.rates)], rotary.interleaved)


class YaRN(PositionModule):
    """`rotary` for `scale` times the trained length, without training (YaRN, Peng et al. 2023).

    A pair that turns at least `beta` times over the trained length keeps its frequency, one that turns at most `alpha`
    times gets it divided by scale, and between them the two are mixed linearly. (Trained shorter than 2 pi beta = 201
    tokens, no pair turns that often, and even the fastest is stretched a little.)

    Logits are multiplied by (0.1 ln(scale) + 1)^2. The paper multiplies q and k by its root each; here q takes both,
    since keys from a cache are rotated in several steps.
    """

    def __init__(
        self, rotary: RotaryEmbedding, scale: float, trained_length: int, alpha: float = 1.0, beta: float = 32.0
    ):
        turns = [trained_length * rate.imag / (2 * math.pi) for rate in rotary.rates]
        kept = [min(max((turn - alpha) / (beta - alpha), 0.0), 1.0) for turn in turns]
        stretched = [rate * (own + (1 - own) / scale) for rate, own in zip(rotary.rates, kept, strict=True)]
        super().__init__(stretched, rotary.interleaved)
        self.factor = (0.1 * math.log(scale) + 1) ** 2

    def rotated(self, x: Tensor, table: Tensor | None, inverse: bool = False) -> Tensor:
        """As `PositionModule.rotated`, with queries sharpened."""
        x = super().rotated(x, table, inverse)
        return x if inverse else x * self.factor


def rescaled_modes(length: int) -> list[Mode]:
    """For RoPE alone: dense, with its angles rescaled to each context."""
    return [
        Mode("NTK", "dense, NTK-aware", rescale=ntk_scaled),
        Mode("YaRN", "dense, YaRN", rescale=lambda rotary, scale: YaRN(rotary, scale, length)),
    ]
