"""Distance biases and gains of attention logits, and query scaling.

Axes: b batch, h heads, n queries, m keys.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from xpos_zoo.checks import as_integer, as_number


class QueryScaling(Protocol):
    """A factor on each query by how many keys it sees: `visible_keys` holds integers (...), the factor is as `dtype`.

    It must be hashable, as a frozen dataclass is: layers with equal ones share a plan.
    """

    def __call__(self, visible_keys: Tensor, dtype: torch.dtype) -> Tensor: ...


class DistanceBias(Protocol):
    """A function of how far a key lies before a query, added to their scaled score before the softmax.

    `distance`, the query's position minus the key's, holds integers from 0 on, (b, 1, n, m); it is called with all
    distances that occur, often once each (b = n = 1). The bias is float32 and broadcasts against (b, h, n, m); minus
    infinity hides a key. It must be hashable, as functions and modules are: layers with equal ones share a plan.

    One that has a method `gain(distance)`, too, of the same shapes, has the scaled score multiplied by it before: at
    distance t a score S becomes gain_t S + bias_t.
    """

    def __call__(self, distance: Tensor) -> Tensor: ...


def bias_and_gain(distance_bias: DistanceBias | None, distance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bias and, if there is one, gain of logits at distances (b, 1, n, m); both broadcast against (b, h, n, m)."""
    if distance_bias is None:
        return torch.zeros((), device=distance.device).expand(distance.shape), None
    gain = getattr(distance_bias, "gain", None)
    return distance_bias(distance), None if gain is None else gain(distance)


def hold_numbers(thing: Any, positive: Sequence[str] = (), or_zero: Sequence[str] = ()) -> None:
    """Have a frozen dataclass hold these attributes as plain numbers, which can be compared and saved; ValueError if
    one is negative, infinite, no number, or 0 though it must be positive."""
    for name in (*or_zero, *positive):
        object.__setattr__(thing, name, as_number(name, getattr(thing, name), name in positive))


@dataclass(frozen=True)
class SoftTail:
    """Let the weight of keys beyond the trained length fall off, at evaluation time and without any training.

    At distance m > trained_length, -power * ln(m / trained_length) is added to the logit: weights then fall as
    m^-power, and for a power above 1 the sheer number of far keys cannot drown the near ones (a convergent tail, as in
    KERPLE's logarithmic kernel, Chi et al. 2022, arXiv 2205.09921). ValueError if power is negative or infinite, or
    trained_length is not positive.
    """

    power: float
    trained_length: int

    def __post_init__(self) -> None:
        hold_numbers(self, ["trained_length"], ["power"])

    def __call__(self, distance: Tensor) -> Tensor:
        return -self.power * torch.log((distance.float() / self.trained_length).clamp(min=1))


@dataclass(frozen=True)
class ScaleInvariant:
    """Logits whose share of far keys does not grow with their number, in training and after (arXiv 2505.17083).

    At distance t a score S becomes a_t S + 1 - a_t^2, where a_t^2 = 2 ln(t / tau + 1) + 1: if scores are normally
    distributed, the keys between t and 2 t together weigh the same for every t above tau. With a discount, all that is
    trained_length or farther away gets -discount added, so that a key there weighs e^-discount of what it would. A
    training at that length sees nothing of it: it may as well be set afterwards. ValueError if tau is not positive and
    finite, discount is negative or infinite, trained_length is not positive, or there is a discount without it.
    """

    tau: float = 10.0
    discount: float = 0.0
    trained_length: int | None = None

    def __post_init__(self) -> None:
        hold_numbers(self, ["tau"], ["discount"])
        if self.discount or self.trained_length is not None:
            hold_numbers(self, ["trained_length"])

    def gain(self, distance: Tensor) -> Tensor:
        return (2 * torch.log1p(distance.clamp(min=0).float() / self.tau) + 1).sqrt()

    def __call__(self, distance: Tensor) -> Tensor:
        bias = -2 * torch.log1p(distance.clamp(min=0).float() / self.tau)
        if self.trained_length is None:
            return bias
        return torch.where(distance < self.trained_length, bias, bias - self.discount)


@dataclass(frozen=True)
class ALiBi:
    """Attention with linear biases (Press et al. 2022): logits of head k fall by slope_k per position of distance.

    Slopes are 2^(-8k/h) for heads k = 1 .. h if h is a power of two; otherwise, as published, those of the power of two
    below h, then every other one of the power of two above it. `num_heads` is the attention's own; ValueError if it is
    not positive.
    """

    num_heads: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_heads", as_integer("num_heads", self.num_heads))

    def slopes(self, device: torch.device | None = None) -> Tensor:
        """Of each head, (h,), float32."""
        below = 2 ** (self.num_heads.bit_length() - 1)
        own = torch.arange(1, below + 1, dtype=torch.float32, device=device)
        between = torch.arange(self.num_heads - below, dtype=torch.float32, device=device) + 0.5
        return torch.exp2(torch.cat((own, between)) * (-8 / below))

    def __call__(self, distance: Tensor) -> Tensor:
        return -rearrange(self.slopes(distance.device), "h -> h 1 1") * distance


@dataclass(frozen=True)
class LogNScaling:
    """Sharpen queries that see more keys than in training, at evaluation time and without any training.

    A query that sees n keys is multiplied by 1 + coefficient * ln(n / trained_length) if n is above trained_length, so
    that the sheer number of far keys does not drown the near ones (log-n scaling; Llama 4 uses 0.1). ValueError if
    coefficient is negative or infinite, or trained_length is not positive.
    """

    coefficient: float
    trained_length: int

    def __post_init__(self) -> None:
        hold_numbers(self, ["trained_length"], ["coefficient"])

    def __call__(self, visible_keys: Tensor, dtype: torch.dtype) -> Tensor:
        return 1 + self.coefficient * torch.log((visible_keys.to(dtype) / self.trained_length).clamp(min=1))


@dataclass(frozen=True)
class ScalableSoftmax:
    """Sharpen queries by the number of keys that they see, in training and after (SSMax, Nakanishi 2025, 2501.19399).

    A query that sees n keys is multiplied by ln(n + e) / ln(trained_length + e). The factor that the paper learns for
    each head is a scale of that head's rows of `q_proj`, which are learned anyway. ValueError if trained_length is not
    positive.
    """

    trained_length: int

    def __post_init__(self) -> None:
        hold_numbers(self, ["trained_length"])

    def __call__(self, visible_keys: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.log(visible_keys.to(dtype) + math.e) / math.log(self.trained_length + math.e)
