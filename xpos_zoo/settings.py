"""What a plan is made from: how a layer attends, and the tokens of a forward.

Axes: b batch, n sequence, c features; rows is b, or 1 where all rows of the batch are alike.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xpos_zoo.bias import DistanceBias, QueryScaling
from xpos_zoo.rotary import PositionModule
from xpos_zoo.visibility import AttentionPattern


@dataclass(frozen=True, eq=False)
class AttentionSettings:
    """How a layer attends, apart from its weights.

    Attributes:
        positions, query_scaling, distance_bias: as `MultiHeadAttention` has them.
        pattern: which keys a query sees.
        dropout_p: probability of dropping an attention weight now; 0 in evaluation.
        cp_rank: how many ranks have tokens before these, with context parallelism.
    """

    positions: PositionModule
    pattern: AttentionPattern
    query_scaling: QueryScaling | None = None
    distance_bias: DistanceBias | None = None
    dropout_p: float = 0.0
    cp_rank: int = 0

    def plan_key(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What is equal in layers that share a plan for q and k of `dtype`; bfloat16 and float32 may share one."""
        precision = dtype if dtype in (torch.float16, torch.float64) else None
        pattern = self.pattern.block_size, self.pattern.window_size
        settings = *pattern, self.query_scaling, self.distance_bias, self.dropout_p > 0, self.cp_rank
        # Rates in place of the module: layers that are compiled one by one then share a graph.
        return self.positions.rates, self.positions.interleaved, *settings, precision

    def num_before(self, n: int) -> int:
        """How many keys other ranks give to n queries of this one: those of a row, or all before them."""
        length = self.pattern.row_length
        return n * self.cp_rank if length is None else length * (self.cp_rank > 0)

    @property
    def has_learned_bias(self) -> bool:
        """Whether the distance bias may have parameters, which belong to a layer: each layer then evaluates it."""
        return isinstance(self.distance_bias, nn.Module)

    @property
    def has_gain(self) -> bool:
        return hasattr(self.distance_bias, "gain")


@dataclass(frozen=True, eq=False)
class Padding:
    """Tokens that do not count, anywhere in a row: while a layer attends, they stand behind the others.

    Attributes:
        mask: where they are, (b, n, 1).
        order, inverse: which token moves to each place, and back, (b, n, 1).
    """

    mask: Tensor
    order: Tensor
    inverse: Tensor

    def unpad(self, x: Tensor) -> Tensor:
        """x (b, n, c) with the padding moved to the end, and set to 0, for it may hold anything."""
        return x.masked_fill(self.mask, 0).gather(1, self.order.expand_as(x))

    def pad(self, x: Tensor) -> Tensor:
        """The inverse of `unpad`, with zeros for padding."""
        return x.gather(1, self.inverse.expand_as(x)).masked_fill(self.mask, 0)


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """The tokens of a forward: b rows of n.

    Attributes:
        dtype, device: of queries and keys.
        cached: tokens before them, (b,), in a cache; None without.
        counts: how many of each row's n tokens count, (b,), the others being padding; None if all do.
        longest: the most tokens that a row has with these; None if it is not known before a graph runs.
        document_ids: (b, n) or None; with context parallelism, those of keys from other ranks before them.
        padding: None if all tokens count, or the first `counts` of each row.
    """

    b: int
    n: int
    dtype: torch.dtype
    device: torch.device
    cached: Tensor | None = None
    counts: Tensor | None = None
    longest: int | None = None
    document_ids: Tensor | None = None
    padding: Padding | None = None

    @property
    def first(self) -> Tensor | int:
        """The position of each row's first token, (b, 1), or 0 without a cache."""
        return 0 if self.cached is None else self.cached[:, None]

    @property
    def positions(self) -> Tensor:
        """The position of each token, (rows, n)."""
        return self.first + torch.arange(self.n, device=self.device)[None]


def statically_true(condition: bool) -> bool:
    """Whether the condition holds; in a graph for any length, whether it holds for all."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a third of a second, for a compiler only

    return statically_known_true(condition)
