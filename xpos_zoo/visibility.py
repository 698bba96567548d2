"""Which keys a query sees, and what that and their distance make of its logits.

Axes: b batch, h heads, n queries, m keys; rows is b, or 1 where all rows of the batch are alike.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xpos_zoo.bias import DistanceBias, bias_and_gain
from xpos_zoo.rotation import at_least_float32


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys a query sees: its own position and those before it, of its own block of `block_size` tokens and the
    block before, or among the last `window_size` tokens; all of them if both are None."""

    block_size: int | None = None
    window_size: int | None = None

    @property
    def row_length(self) -> int | None:
        """How many queries make a row of the batch, and see keys of it and of the row before; None if dense."""
        return self.window_size if self.block_size is None else self.block_size

    def start(self, position: Tensor) -> Tensor:
        """The oldest position that a query at each position sees."""
        if self.window_size is not None:
            return (position - self.window_size + 1).clamp(min=0)
        if self.block_size is not None:
            return ((position // self.block_size - 1) * self.block_size).clamp(min=0)
        return torch.zeros_like(position)

    def is_visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at some positions see keys at others (broadcast). No key is at a position below 0."""
        return (key <= query) & (key >= self.start(query))

    def count_visible(self, positions: Tensor, documents: Tensor | None) -> Tensor:
        """How many keys tokens at positions (rows, n) see, (b or 1, n); with documents (b, m), of their own document.

        The tokens are then the last n of m.
        """
        start = self.start(positions)
        if documents is None:
            return positions + 1 - start
        # Tokens in order of their documents; a token counts from the first visible one of its own to itself.
        m, order = documents.shape[1], documents.argsort(dim=1, stable=True)
        sorted_ids = documents.gather(1, order)
        group = m * (sorted_ids != sorted_ids.roll(1, dims=1)).cumsum(1)
        own = torch.empty_like(group).scatter(1, order, group)[:, m - positions.shape[1] :]
        places = group + order
        end = torch.searchsorted(places, own + positions, right=True)
        return end - torch.searchsorted(places, own + start)


@dataclass(frozen=True, eq=False)
class LogitTerms:
    """What becomes of scaled scores (b, h, n, m): score * gain + bias. The bias is minus infinity at hidden keys."""

    bias: Tensor
    gain: Tensor | None


@dataclass(frozen=True, eq=False)
class DistanceTable:
    """`LogitTerms` by distance, (h or 1, 2 m) each: from distance m - 1 in the first column to -m in the last.

    Keys behind the query, at distances below 0, are hidden. The terms of a query on keys 0, 1, ... are then a stretch
    of a row, wherever it stands, and functions of distance are evaluated 2 m times, not n m times.
    """

    bias: Tensor
    gain: Tensor | None

    @classmethod
    def make(cls, distance_bias: DistanceBias | None, visibility: "Visibility") -> "DistanceTable":
        num_keys, device = visibility.num_keys, visibility.q_positions.device
        distance = num_keys - 1 - torch.arange(2 * num_keys, device=device)
        bias, gain = bias_and_gain(distance_bias, distance.clamp(min=0)[None, None, None])
        hidden = ~visibility.is_visible(distance, torch.zeros_like(distance))
        bias = bias.expand(torch.broadcast_shapes(bias.shape, (1, 1, 1, len(distance)))).masked_fill(hidden, -torch.inf)
        return cls(bias[0, :, 0], None if gain is None else gain.expand(1, -1, 1, len(distance))[0, :, 0])

    def rows(self, q_positions: Tensor, num_keys: int) -> LogitTerms:
        """The terms of queries at positions (rows, n) on keys at 0 .. num_keys - 1: (rows, h or 1, n, m)."""
        zero = self.bias.shape[-1] // 2 - 1  # the column of distance 0; padding may stand behind the last key
        first = (zero - q_positions).clamp(min=0)

        def take(table: Tensor) -> Tensor:
            if torch.compiler.is_compiling():  # `unfold` would make a graph of its own for each number of keys
                return table[:, first[..., None] + torch.arange(num_keys, device=table.device)].transpose(0, 1)
            return table.unfold(-1, num_keys, 1)[:, first].transpose(0, 1)

        return LogitTerms(take(self.bias), None if self.gain is None else take(self.gain))


@dataclass(frozen=True, eq=False)
class Visibility:
    """Queries at some positions on keys at positions 0, 1, ..., m - 1.

    Attributes:
        q_positions: (rows, n), below m but for padding.
        num_keys: m.
        needs_terms: whether attention needs `LogitTerms`; else it is causal, and the last query sees the last key.
        window_size: how many keys they see, or None for all before them: blocks hide none within a row.
        q_documents, k_documents: (b, n) and (b, m), or None: keys of another document are hidden.
        table: the terms by distance, if all layers share them.
        terms: those of all queries and keys, if all layers share them and they are few.
    """

    q_positions: Tensor
    num_keys: int
    needs_terms: bool
    window_size: int | None
    q_documents: Tensor | None = None
    k_documents: Tensor | None = None
    table: DistanceTable | None = None
    terms: LogitTerms | None = None

    def is_visible(self, query: Tensor, key: Tensor) -> Tensor:
        return AttentionPattern(window_size=self.window_size).is_visible(query, key)

    def prepare(self, distance_bias: DistanceBias | None, dtype: torch.dtype, keep_terms: bool) -> "Visibility":
        """With the table, unless the bias may have parameters, which belong to a layer; and, if asked, the terms."""
        if not self.needs_terms or isinstance(distance_bias, nn.Module):
            return self
        visibility = replace(self, table=self.make_table(distance_bias))
        if keep_terms:
            n = self.q_positions.shape[1]
            visibility = replace(visibility, terms=visibility.logit_terms(distance_bias, (0, n, self.num_keys), dtype))
        return visibility

    def make_table(self, distance_bias: DistanceBias | None) -> DistanceTable:
        return DistanceTable.make(distance_bias, self)

    def logit_terms(
        self, distance_bias: DistanceBias | None, chunk: tuple[int, int, int], dtype: torch.dtype
    ) -> LogitTerms | None:
        """The terms of a chunk's queries start .. stop - 1 on the first `num_keys` keys, for q of `dtype`; None if
        attention needs none."""
        start, stop, num_keys = chunk
        if not self.needs_terms:
            return None
        if self.terms is not None:
            bias, gain = self.terms.bias, self.terms.gain
            part = (..., slice(start, stop), slice(0, num_keys))
            return LogitTerms(bias[part], None if gain is None else gain[part])
        terms = (self.table or self.make_table(distance_bias)).rows(self.q_positions[:, start:stop], num_keys)
        bias = terms.bias
        if self.q_documents is not None and self.k_documents is not None:
            same = self.q_documents[:, start:stop, None] == self.k_documents[:, None, :num_keys]
            bias = torch.where(same[:, None], bias, -torch.inf)
        # On CUDA the memory-efficient kernel wants q's dtype, so that a bias is rounded there: one of 10 by up to 0.03
        # in bfloat16 and 0.004 in float16. On the CPU it may be more precise than q.
        dtype = dtype if bias.device.type == "cuda" else at_least_float32(dtype)
        return LogitTerms(bias.to(dtype), terms.gain)
