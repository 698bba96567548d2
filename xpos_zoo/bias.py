"""What is added to attention logits by distance alone: `DistanceBias`, and the soft tail.

Axes: b batch, h heads, n queries, m keys.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DistanceBias(Protocol):
    """A function of how far a key lies before a query, added to their scaled score before the softmax."""

    def __call__(self, distance: Tensor) -> Tensor:
        """The bias, float32, broadcasting against (b, h, n, m); minus infinity hides a key.

        Args:
            distance: position of the query minus that of the key, integers (..., n, m) with an axis of 1 for the heads:
                0 or above wherever the query may look. Elsewhere it may be negative, and the bias does not count.
        """
        ...


@dataclass(frozen=True)
class SoftTail:
    """Let the weight of keys beyond the trained length fall off, at evaluation time and without any training.

    At distance m > trained_length, -power * ln(m / trained_length) is added to the logit, at others nothing: weights
    then fall as m^-power, and for a power above 1 the sheer number of far keys cannot drown the near ones (a convergent
    tail, as in KERPLE's logarithmic kernel, Chi et al. 2022, arXiv 2205.09921).

    Raises:
        ValueError: power is negative or infinite, or trained_length is not positive.
    """

    power: float
    trained_length: int

    def __post_init__(self) -> None:
        if not 0 <= self.power < math.inf:
            raise ValueError(f"power must be 0 or above and finite, got {self.power}")
        if not self.trained_length > 0:
            raise ValueError(f"trained_length must be above 0, got {self.trained_length}")

    def __call__(self, distance: Tensor) -> Tensor:
        """The bias at each distance, float32, in the shape of `distance`; 0 at negative ones."""
        return -self.power * torch.log((distance.float() / self.trained_length).clamp(min=1))
