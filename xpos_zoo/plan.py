"""The plan of a forward: all that follows from positions and lengths alone, made once and used by every layer.

Axes: b batch, h heads, n queries, m keys, j blocks or parts, w tokens in a block, p tokens in a part, i channel pairs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from xpos_zoo.bias import DistanceBias, QueryScaling
from xpos_zoo.cache import LayerCache, Slots, part_size
from xpos_zoo.rotary import PositionModule, as_table, at_least_float32

QUERY_CHUNK = 1024  # queries at a time where there is a mask: bounds it at 1024 x m
GAINED_CHUNK = 128  # with a gain, whose products no kernel fuses: their scores stay in a CPU's caches
ALL = sys.maxsize  # of them


def first_seen(at: Tensor, block_size: int | None) -> Tensor:
    """The oldest position that a query at each position sees: the first, or that of the block before its own."""
    return torch.zeros_like(at) if block_size is None else ((at // block_size - 1) * block_size).clamp(min=0)


def sees(
    q_at: Tensor, k_at: Tensor, block_size: int | None, q_ids: Tensor | None = None, k_ids: Tensor | None = None
) -> Tensor:
    """Who sees whom: whether queries at q_at (..., n) see keys at k_at (..., m), (..., n, m).

    Causally, from `first_seen` on, and only keys of the same document if there are ids; never a position below 0.
    """
    ids = None if q_ids is None or k_ids is None else (q_ids[..., None], k_ids[..., None, :])
    return one_sees(q_at[..., None], k_at[..., None, :], block_size, ids)


def one_sees(q: Tensor, k: Tensor, block_size: int | None, ids: tuple[Tensor, Tensor] | None) -> Tensor:
    """`sees` of each query and key of two tensors that broadcast."""
    seen = (k <= q) & (k >= first_seen(q, block_size))
    return seen if ids is None else seen & (ids[0] == ids[1])


@dataclass(frozen=True, eq=False)
class Pattern:
    """How a layer attends, apart from its weights.

    `preceded`: in blocks, whether one of keys comes before the first of the queries.
    """

    positions: PositionModule
    block_size: int | None = None
    query_scaling: QueryScaling | None = None
    distance_bias: DistanceBias | None = None
    preceded: bool = False

    def plan_key(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What is equal in layers that share a plan for q and k of `dtype`; bfloat16 and float32 may share one."""
        # Without modules where that can be, so that layers compiled one by one share a graph.
        positions, precision = self.positions, dtype if dtype in (torch.float16, torch.float64) else None
        own = positions if hasattr(positions, "distance_bias") else None
        settings = self.block_size, self.query_scaling, self.distance_bias, self.preceded
        return positions.rates, positions.interleaved, own, *settings, precision

    @property
    def biases(self) -> list[DistanceBias]:
        both = (self.distance_bias, getattr(self.positions, "distance_bias", None))
        return [bias for bias in both if bias is not None]

    @property
    def biased(self) -> bool:
        return len(self.biases) > 0  # torch 2.11 compiles no bool of a list

    @property
    def learned(self) -> bool:
        """Whether a bias may have parameters, which belong to a layer: then each layer evaluates it."""
        return isinstance(self.distance_bias, nn.Module) or any(True for _ in self.positions.parameters())


@dataclass(frozen=True, eq=False)
class Padding:
    """Tokens that do not count, anywhere in a row: while a layer attends, they stand behind the others.

    Attributes:
        mask: where they are, (b, n, 1).
        order, back: which token comes to each place, and the inverse, (b, n, 1).
    """

    mask: Tensor
    order: Tensor
    back: Tensor

    def moved(self, x: Tensor) -> Tensor:
        """x (b, n, c) with padding, zeroed for it may hold anything, at the end."""
        return x.masked_fill(self.mask, 0).gather(1, self.order.expand_as(x))

    def returned(self, x: Tensor) -> Tensor:
        """The inverse of `moved`, with zeros for padding."""
        return x.gather(1, self.back.expand_as(x)).masked_fill(self.mask, 0)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a forward: b rows of n.

    Attributes:
        length: tokens before them, (b,), in a cache; None without.
        count: how many of the n count, (b,), the others being padding; None for all.
        most: the most tokens that a row has with these; None if that is not known before the graph runs.
        document_ids: (b, n) or None; if the pattern is preceded, of that block, too.
        padding: None if all tokens count, or the first `count` of each row.
    """

    b: int
    n: int
    dtype: torch.dtype
    device: torch.device
    length: Tensor | None = None
    count: Tensor | None = None
    most: int | None = None
    document_ids: Tensor | None = None
    padding: Padding | None = None

    @property
    def first(self) -> Tensor | int:
        """The position of each row's first token, (b, 1), or 0 without a cache."""
        return 0 if self.length is None else self.length[:, None]

    @property
    def positions(self) -> Tensor:
        """The position of each token, (b, n), or (n,) without a cache."""
        return self.first + torch.arange(self.n, device=self.device)


@dataclass(frozen=True, eq=False)
class Window:
    """Queries and the keys that they attend to.

    Attributes:
        q_at, k_at: their positions, (..., n) and (..., m), from any origin that `sees` may use.
        q_ids, k_ids: their documents, likewise, or None.
        shifts: for each chunk of queries, the table (rows, ..., j, 1, 1, i) that brings the keys of each part to the
            chunk's origin; None if they are measured from it already.
        masked: whether attention takes a mask; else it is causal, and the last query sees the last key.
        mask, gain: what is added to the logits and, if any pattern asks for that, what they are multiplied by before,
            if they are the same for all queries and layers.
        tables: for FlexAttention, bias and gain, or None, at distances 0, 1, ..., (1 or h, m), likewise.
    """

    q_at: Tensor
    k_at: Tensor
    q_ids: Tensor | None = None
    k_ids: Tensor | None = None
    shifts: tuple[Tensor, ...] | None = None
    masked: bool = True
    mask: Tensor | None = None
    gain: Tensor | None = None
    tables: tuple[Tensor, Tensor | None] | None = None

    def logits_by_distance(
        self, rows: slice, keys: slice, pattern: Pattern, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the logits of some queries and keys, (b, h, n, m): a bias, minus infinity where unseen; and
        what they are multiplied by before. None for what attention does without."""
        if not self.masked:
            return None, None
        if self.mask is not None:
            return self.mask[..., rows, keys], None if self.gain is None else self.gain[..., rows, keys]
        q_at, k_at = self.q_at[..., rows], self.k_at[..., keys]
        q_ids = None if self.q_ids is None else self.q_ids[..., rows]
        k_ids = None if self.k_ids is None else self.k_ids[..., keys]
        seen, distance = sees(q_at, k_at, pattern.block_size, q_ids, k_ids), q_at[..., None] - k_at[..., None, :]
        seen, distance = (t[(None,) * (3 - t.ndim)][:, None] for t in (seen, distance))  # (b, 1, n, m)
        bias, gain = logits_at(distance, pattern)
        # On the CPU it may be more precise than q. CUDA's memory-efficient kernel wants q's dtype, so that there a bias
        # is rounded: one of 10 by up to 0.03 in bfloat16, 0.004 in float16.
        dtype = dtype if q_at.device.type == "cuda" else at_least_float32(dtype)
        return torch.where(seen, bias, -torch.inf).to(dtype), gain

    def score_mod(self, rows: slice, keys: slice, pattern: Pattern) -> Callable[..., Tensor]:
        """The same as a function of FlexAttention, from tables of gain and bias by distance."""
        q_at, k_at = self.q_at[..., rows], self.k_at[..., keys]
        q_ids = None if self.q_ids is None else self.q_ids[..., rows]
        k_ids = None if self.k_ids is None else self.k_ids[..., keys]
        bias, gain = self.tables or self.with_tables(pattern).tables  # type: ignore[misc]

        def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            q, k = (at[index] if at.ndim == 1 else at[b, index] for at, index in ((q_at, i), (k_at, j)))
            ids = None if q_ids is None or k_ids is None else (q_ids[b, i], k_ids[b, j])
            t = (q - k).clamp(0, bias.shape[-1] - 1)  # padding may stand farther than any key
            score = score if gain is None else score * gain[h % len(gain), t]
            return torch.where(one_sees(q, k, pattern.block_size, ids), score + bias[h % len(bias), t], -torch.inf)

        return modified

    def with_mask(self, pattern: Pattern, dtype: torch.dtype) -> "Window":
        """With mask and gain, if no layer has its own and they, which are n x m, are not too large to be kept."""
        if not self.masked or pattern.learned:
            return self
        if flexible(pattern, self.q_at.shape[-1], self.q_at.device, dtype):
            return self.with_tables(pattern)
        if self.q_at.shape[-1] > QUERY_CHUNK:
            return self
        mask, gain = self.logits_by_distance(slice(None), slice(None), pattern, dtype)
        return replace(self, mask=mask, gain=None if gain is None else torch.broadcast_tensors(gain, mask)[0])

    def with_tables(self, pattern: Pattern) -> "Window":
        distance = torch.arange(self.k_at.shape[-1], device=self.k_at.device)  # none that counts is farther
        bias, gain = logits_at(distance[None, None, None], pattern)
        return replace(self, tables=(bias[0, :, 0], None if gain is None else gain[0, :, 0]))


def logits_at(distance: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
    """Bias and, if there is one, gain of logits at distances (b, 1, n, m), broadcasting against (b, h, n, m)."""
    bias = sum((bias(distance) for bias in pattern.biases), torch.zeros((), device=distance.device))
    gains = [bias.gain(distance) for bias in pattern.biases if hasattr(bias, "gain")]  # type: ignore[attr-defined]
    return bias, reduce(torch.mul, gains) if gains else None


def flexible(pattern: Pattern, n: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend` leaves biases of n queries to FlexAttention: on CUDA one kernel, where masks would be n x m."""
    fits = dtype != torch.float64 and len(pattern.positions.rates) >= 8  # head dimensions from 16 on
    return pattern.biased and n > 1 and device.type == "cuda" and fits


class Plan:
    """How layers of one pattern attend in this forward. Not to be changed.

    Neither a tuple nor a dataclass: FSDP2's mixed precision casts the tensors in these, and would round the tables.

    Args:
        q_table, k_table: for queries and keys, as `make_table` gives them. Keys of a cache are rotated already, but for
            those in blocks.
        windows: one; or that of the first block, and that of all others, which are batch rows.
        chunk: queries at a time.
        part: keys that share an origin.
        slots: of a cache.

    `key` is the pattern's `plan_key`, `padding` that of the tokens.
    """

    key: tuple[Any, ...]
    padding: Padding | None

    def __init__(
        self,
        q_table: Tensor | None,
        k_table: Tensor | None,
        windows: tuple[Window, ...],
        chunk: int,
        part: int,
        slots: Slots | None,
    ):
        self.q_table, self.k_table, self.windows = q_table, k_table, windows
        self.chunk, self.part, self.slots = chunk, part, slots


def make_plan(pattern: Pattern, tokens: Tokens, cache: LayerCache | None = None) -> Plan:
    """The plan for these tokens, with the cache of one of the layers if they have one."""
    w = pattern.block_size
    if cache is not None and tokens.n == 1:
        plan = plan_token(pattern, tokens, cache)
    elif w is not None and (cache is not None or pattern.preceded or tokens.n > 2 * w):
        plan = plan_blocks(pattern, tokens, w, cache)
    else:  # in up to two blocks, every query sees all before it
        plan = plan_sequence(pattern, tokens, cache)
    plan.key, plan.padding = pattern.plan_key(tokens.dtype), tokens.padding
    return plan


def plan_sequence(pattern: Pattern, tokens: Tokens, cache: LayerCache | None) -> Plan:
    """Queries on all keys before them: those that come with them, or a cache's."""
    n, positions, ids, q_at = tokens.n, pattern.positions, tokens.document_ids, tokens.positions
    masked = pattern.biased or ids is not None or cache is not None
    gained = any(hasattr(bias, "gain") for bias in pattern.biases)
    fused = torch.compiler.is_compiling() or flexible(pattern, n, tokens.device, tokens.dtype)
    limit = GAINED_CHUNK if gained and not fused else QUERY_CHUNK  # a graph would hold every chunk
    if cache is None:
        k_at, p = q_at, part_size(positions)
    else:
        k_at, p = torch.arange(cache.used(tokens.most), device=tokens.device), cache.part_size
    if n <= positions.max_span(tokens.dtype) and (cache is None or not positions.decays):  # one origin for all
        k_table = make_table(pattern, q_at - (n // 2 if cache is None else 0), tokens)
        q_table, shifts, chunk = k_table, None, limit if masked else ALL
    else:
        chunk = min(positions.max_span(tokens.dtype), limit)
        masked = masked or not aligned(pattern, tokens)
        q_table = make_table(pattern, torch.arange(n, device=tokens.device) % chunk - chunk // 2, tokens)
        k_table = make_table(pattern, q_at % p, tokens)
        part_at = torch.arange(0, k_at.shape[-1], p, device=tokens.device)
        shifts = shift_tables(pattern, tokens, part_at - tokens.first, n, chunk)
    window = Window(q_at, k_at, ids, ids, shifts, masked).with_mask(pattern, tokens.dtype)
    slots = None if cache is None else make_slots(tokens, cache, k_table)
    return Plan(scaled(q_table, pattern, q_at), k_table, (window,), chunk, p, slots)


def plan_blocks(pattern: Pattern, tokens: Tokens, w: int, cache: LayerCache | None) -> Plan:
    """Blocks as batch rows, each on itself and the block before it; the first apart, for it has none before it.

    From a cache, each row is laid out from the first block that its new tokens see.
    """
    n, ids, span = tokens.n, tokens.document_ids, pattern.positions.max_span(tokens.dtype)
    blocks = block_count(n, w, cache is not None) + int(pattern.preceded)
    at = torch.arange(2 * w, device=tokens.device)
    p = part_size(pattern.positions, w)
    must_mask = pattern.biased or ids is not None
    masked = must_mask or not aligned(pattern, tokens)
    if 2 * w <= span:  # one origin for both blocks
        chunk = min(w, QUERY_CHUNK) if masked else ALL
        k_table = make_table(pattern, at - w, tokens)
        q_table = None if k_table is None else k_table[:, w:]
        first_shifts = shifts = None
    else:
        chunk = min(w, span, QUERY_CHUNK)
        k_table = make_table(pattern, at[:w] % p, tokens)
        q_table = make_table(pattern, at[:w] % chunk - chunk // 2, tokens)
        part_at = torch.arange(-w, w, p, device=tokens.device)
        first_shifts, shifts = (shift_tables(pattern, tokens, each, w, chunk) for each in (part_at[w // p :], part_at))
    q_at, slots = torch.arange(w * pattern.preceded, blocks * w, device=tokens.device), None
    if cache is not None and tokens.length is not None:
        start = first_seen(tokens.length[:, None], w)
        q_at = start + q_at
        # Places after a row's last token repeat it, for padding may hold anything; their outputs are dropped.
        token = (q_at - tokens.first).clamp(max=n - 1 if tokens.count is None else tokens.count[:, None] - 1)  # type: ignore[arg-type]
        slots = replace(
            make_slots(tokens, cache, make_table(pattern, tokens.positions % cache.part_size, tokens)),
            places=torch.where(token < 0, q_at % cache.slots, cache.slots + token),
            asked=tokens.positions - start,
            restore=make_table(pattern, -(torch.arange(cache.slots, device=tokens.device) % cache.part_size), tokens),
        )
    first_ids = rest_ids = k_ids = None
    if ids is not None:
        ids = rearrange(pad(ids, (0, blocks * w - ids.shape[1])), "b (j w) -> b j w", w=w)
        first_ids, rest_ids = ids[:, 0], ids[:, 1:].flatten(0, 1)
        k_ids = torch.cat((ids[:, :-1], ids[:, 1:]), dim=-1).flatten(0, 1)
    first = Window(at[:w], at[:w], first_ids, first_ids, first_shifts, must_mask or (masked and chunk < w))
    rest = Window(at[w:], at, rest_ids, k_ids, shifts, masked)
    both = first.with_mask(pattern, tokens.dtype), rest.with_mask(pattern, tokens.dtype)
    q_table = scaled(q_table, pattern, rearrange(q_at, "... (j w) -> ... j w", w=w))
    return Plan(q_table, k_table, both, chunk, p, slots)


def plan_token(pattern: Pattern, tokens: Tokens, cache: LayerCache) -> Plan:
    """One query a row on a cache that holds its key already, in one version of it for each part."""
    q_at, p = tokens.positions, cache.part_size
    slot = torch.arange(cache.used(tokens.most), device=tokens.device)
    k_at = q_at - (q_at - slot) % cache.slots  # of the newest token in each slot, below 0 for none
    # A part starts where its first slot's token is: the others of its visible tokens came after. A part without a token
    # in sight may start after the query.
    versions = (q_at - k_at[:, ::p]).clamp(min=0)
    both = make_table(pattern, torch.cat((versions, q_at % p), dim=1), tokens)
    q_table, k_table = (None, None) if both is None else (both[:, :, :-1], both[:, :, -1:])
    window = Window(q_at, k_at).with_mask(pattern, tokens.dtype)
    return Plan(scaled(q_table, pattern, q_at), k_table, (window,), 1, p, make_slots(tokens, cache, k_table))


def make_slots(tokens: Tokens, cache: LayerCache, table: Tensor | None) -> Slots:
    """Slots for the new tokens, the last of them where there are more than slots."""
    last = min(tokens.n, cache.slots)
    row = torch.arange(tokens.b, device=tokens.device)[:, None]
    if tokens.count is None:
        token = torch.arange(tokens.n - last, tokens.n, device=tokens.device)[None]
        return Slots(row, (tokens.first + token) % cache.slots, table, None if last == tokens.n else token)
    token = tokens.count[:, None] - last + torch.arange(last, device=tokens.device)
    return Slots(row, (tokens.first + token) % cache.slots, table, token.clamp(min=0), token >= 0)


def make_table(pattern: Pattern, at: Tensor, tokens: Tokens) -> Tensor | None:
    """The table for x (..., heads, d) at positions `at`, (rows, ..., 1, i), or None if it changes nothing."""
    if not any(pattern.positions.rates) and pattern.query_scaling is None:
        return None
    return pattern.positions.table(at, at_least_float32(tokens.dtype))[..., None, :]


def scaled(table: Tensor | None, pattern: Pattern, q_at: Tensor) -> Tensor | None:
    """A table for queries at q_at (...), the positions in their sequences, that scales them, too."""
    if pattern.query_scaling is None or table is None:
        return table
    factor = pattern.query_scaling(q_at + 1 - first_seen(q_at, pattern.block_size), table.dtype)[..., None, None]
    factor = table[2] * factor if len(table) > 2 else factor
    return as_table([torch.stack(torch.broadcast_tensors(table[0], table[1], factor))])


def shift_tables(pattern: Pattern, tokens: Tokens, part_at: Tensor, n: int, chunk: int) -> tuple[Tensor, ...] | None:
    """For each chunk of n queries, the table that brings parts (..., j) from their starts to the chunk's middle.

    part_at counts from the first query. Parts later than a chunk are hidden; held back, they do not overflow.
    """
    from_middle = [part_at.clamp(max=end - 1) - (start + chunk // 2) for start, end in chunks(n, chunk)]
    tables = [make_table(pattern, at, tokens) for at in from_middle]
    return tuple(table[..., None, :] for table in tables if table is not None) or None


def chunks(n: int, chunk: int) -> list[tuple[int, int]]:
    """From where to where each chunk of n queries goes."""
    if n <= chunk:
        return [(0, n)]
    starts = [i * chunk for i in range(-(-n // chunk))]  # in a graph this fixes their number, but not n
    return list(zip(starts, [*starts[1:], n], strict=True))


def aligned(pattern: Pattern, tokens: Tokens) -> bool:
    """Whether `attend` needs no mask for queries that end where their keys do: flash attention is at hand.

    For the head dimensions that every GPU from compute capability 8 on can differentiate, and batches that fit a grid.
    """
    if tokens.device.type != "cuda" or tokens.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim, batch = 2 * len(pattern.positions.rates), tokens.b * (3 + tokens.n // (pattern.block_size or ALL))
    fits = head_dim % 8 == 0 and head_dim <= 192 and batch < 2**16
    return fits and torch.version.hip is None and torch.cuda.get_device_properties(tokens.device).major >= 8


def block_count(n: int, w: int, cached: bool) -> int:
    """Blocks of w tokens for n of them; from a cache, also for what they see before them, wherever they begin."""
    if cached:
        return (n + 3 * w - 2) // w
    if not torch.compiler.is_compiling():
        return -(-n // w)
    # A graph for any length takes a block too many: else there would be one graph more. Not `- known(...)`: torch 2.11
    # and 2.12 cannot subtract a bool from a symbolic integer.
    return n // w if known(n % w == 0) else n // w + 1


def known(condition: bool) -> bool:
    """Whether the condition holds; in a graph for any length, whether it holds for all."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a third of a second, for a compiler only

    return statically_known_true(condition)
