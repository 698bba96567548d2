"""What xPos is compared with: other ways to tell positions, and rotary embedding stretched after training.

Axes: h heads, n queries, m keys, d head dimension, i = d/2 channel pairs.
"""

import math
import sys
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from xpos_zoo import RotaryEmbedding
from xpos_zoo.checks import require_sizes
from xpos_zoo.rotary import at_least_float32


class NoPositions(nn.Module):
    """No encoding at all: a causal model can still tell positions from how much each token sees."""

    def __init__(self, head_dim: int):
        super().__init__()

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """q and k as they are."""
        return q, k

    def max_span(self, dtype: torch.dtype) -> int:
        """No limit; see `RotaryEmbedding.max_span`."""
        return sys.maxsize


class ALiBi(NoPositions):
    """Attention with linear biases (Press et al. 2022): head h's logits fall by slope_h a position of distance.

    Args:
        head_dim: channels of a head; any.
        num_heads: query heads. An attribute, too: `LanguageModel` sets it to its own.

    Raises:
        ValueError: num_heads is not positive.
    """

    def __init__(self, head_dim: int, *, num_heads: int = 1):
        super().__init__(head_dim)
        self.num_heads = num_heads

    @property
    def num_heads(self) -> int:
        return self._num_heads

    @num_heads.setter
    def num_heads(self, value: int) -> None:
        require_sizes(num_heads=value)
        self._num_heads = value

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def distance_bias(self, distance: Tensor) -> Tensor:
        """What is added to logits at each distance (..., n, m): (..., h, n, m), float32."""
        slopes = alibi_slopes(self.num_heads, distance.device).float()
        return -rearrange(slopes, "h -> h 1 1") * distance


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """2^(-8k/h) for heads k = 1 .. h if h is a power of two, (h,), in float64.

    Otherwise, as published, those of the power of two below h, then every other one of the power of two above it.
    """
    below = 2 ** (num_heads.bit_length() - 1)
    own = torch.arange(1, below + 1, dtype=torch.float64, device=device) / below
    between = (torch.arange(num_heads - below, dtype=torch.float64, device=device) + 0.5) / below
    return torch.exp2(-8 * torch.cat((own, between)))


@dataclass(frozen=True)
class SlidingWindow:
    """A distance bias that hides all but the last `size` keys, the query's own included.

    Raises:
        ValueError: size is not positive.
    """

    size: int

    def __post_init__(self) -> None:
        require_sizes(size=self.size)

    def __call__(self, distance: Tensor) -> Tensor:
        """0 where distance is below size, -inf beyond; distance's shape, float32."""
        return torch.zeros_like(distance, dtype=torch.float32).masked_fill(distance >= self.size, -torch.inf)


def ntk_scaled(rotary: RotaryEmbedding, scale: float) -> RotaryEmbedding:
    """`rotary` with the base that stretches its slowest pair by `scale` and leaves its fastest alone ("NTK-aware").

    Args:
        rotary: the position module of a trained model, which keeps its own.
        scale: context length over trained length, at least 1; base becomes base * scale^(d / (d - 2)).

    Raises:
        ValueError: scale is below 1, or rotary is an encoding of another kind.
    """
    check_stretch(rotary, scale)
    d = rotary.head_dim
    base = rotary.base * scale ** (d / (d - 2)) if d > 2 else rotary.base  # a lone pair does not depend on it
    return RotaryEmbedding(d, base=base, interleaved=rotary.interleaved)


def yarn_scaled(rotary: RotaryEmbedding, scale: float, trained_length: int) -> "YaRN":
    """`rotary` as `YaRN` for contexts of scale * trained_length; see there."""
    check_stretch(rotary, scale)
    return YaRN(rotary.head_dim, scale, trained_length, base=rotary.base, interleaved=rotary.interleaved)


def check_stretch(rotary: RotaryEmbedding, scale: float) -> None:
    if type(rotary) is not RotaryEmbedding:
        raise ValueError(f"rotary must be a RotaryEmbedding, which alone can be stretched, got {rotary}")
    if not 1 <= scale < math.inf:
        raise ValueError(f"scale must be 1 or above and finite, got {scale}")


class YaRN(RotaryEmbedding):
    """Rotary embedding for `scale` times the trained length, without training (YaRN, Peng et al. 2023).

    A pair that turns at least `beta` times over the trained length keeps its frequency, one that turns at most `alpha`
    times gets it divided by scale, and between them the two are mixed linearly. (Trained shorter than 2 pi beta = 201
    tokens, no pair turns that often, and even the fastest is stretched a little.)

    Logits are multiplied by (0.1 ln(scale) + 1)^2. The paper multiplies q and k by its root each; here q takes both,
    since keys from a cache are turned in several steps.

    Args:
        head_dim, base, interleaved: see `RotaryEmbedding`.
        scale: context length over trained length.
        trained_length: in tokens.
        alpha, beta: the paper's for Llama.

    Raises:
        ValueError: an argument of `RotaryEmbedding` is out of range, or trained_length is not positive.
    """

    def __init__(
        self,
        head_dim: int,
        scale: float,
        trained_length: int,
        *,
        base: float = 10000.0,
        interleaved: bool = True,
        alpha: float = 1.0,
        beta: float = 32.0,
    ):
        super().__init__(head_dim, base=base, interleaved=interleaved)
        require_sizes(trained_length=trained_length)
        self.scale = scale
        self.trained_length = trained_length
        self.alpha, self.beta = alpha, beta

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}, trained_length={self.trained_length}"

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """As `RotaryEmbedding.rotate`, with q sharpened."""
        q, k = super().rotate(q, k, q_positions, k_positions, origin)
        return q * (0.1 * math.log(self.scale) + 1) ** 2, k

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """theta_i in radians a position for the d/2 pairs, in float64."""
        pair = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        theta = self.base ** (-pair / self.head_dim)
        turns = self.trained_length * theta / (2 * math.pi)
        kept = ((turns - self.alpha) / (self.beta - self.alpha)).clamp(0, 1)
        return kept * theta + (1 - kept) * theta / self.scale

    def _table(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions[..., None] * self.frequencies(positions.device)
        return torch.stack((angle.cos(), angle.sin())).to(at_least_float32(x.dtype))
