"""Dense causal attention: a whole sequence without a cache, or new tokens on what a cache holds.

Axes: b batch, n queries, m keys, h heads, g key-value heads, d head dimension, i channel pairs, j segments of p keys;
rows is b, or 1 where all rows of the batch are alike.

Decay factors are measured from the middle c of a chunk of queries: exp(lambda (n - c)) for queries at n, and
exp(lambda (c - m)) for keys at m. As many queries share a middle as its `max_span` allows. A short sequence is one
chunk, and keys are rotated and scaled at once; of a long one, keys are rotated once and scaled for each chunk, by
slices of one table.
"""

import sys
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from xpos_zoo.cache import LayerCache, WriteIndex
from xpos_zoo.flex import flex_attention, use_flex
from xpos_zoo.rotary import PositionModule, Rotary, make_rotary, materialise
from xpos_zoo.rotation import at_least_float32
from xpos_zoo.settings import AttentionSettings, BatchLayout
from xpos_zoo.softmax import can_skip_mask, softmax_attention
from xpos_zoo.visibility import Visibility

MASK_CHUNK = 1024  # queries at a time where attention takes a mask, which bounds it at 1024 x m
GAIN_CHUNK = 128  # with a gain in eager mode, where no kernel is fused: scores stay in a CPU's caches
NO_LIMIT = sys.maxsize
GRAPH_GROWTH = 4


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """How queries attend to keys, some queries at a time.

    Attributes:
        visibility: which keys they see.
        chunks: the first and last + 1 of the queries that share an origin.
        key_factors: for each chunk, what its keys are multiplied by: (rows, 1, j, p or 1, d), one factor for every
            segment, or j is 1 and every key has its own. Empty if keys are scaled already.
        limit: how many queries attend at a time.
        is_aligned: whether the last query is at the last key; else every query may see any key.
    """

    visibility: Visibility
    chunks: list[tuple[int, int]]
    key_factors: list[Tensor]
    limit: int
    is_aligned: bool = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention of rotated q (b, n, h, d) on rotated k, v (b, m, g, d): (b, n, h, d)."""
        visibility, bias, outputs, later = self.visibility, settings.distance_bias, [], k.shape[1] - q.shape[1]
        q, k, v = (rearrange(t, "b n h d -> b h n d") for t in (q, k, v))
        flex = use_flex(settings, q.shape[2], q.device, q.dtype)
        table = (visibility.table or visibility.make_table(bias)) if flex else None
        if not flex and (visibility.needs_terms or q.device.type != "cuda" or q.dtype == torch.float32):
            k, v = (t if t.shape[1] == q.shape[1] else repeat_heads(t, q.shape[1]) for t in (k, v))
        for i, (first, last) in enumerate(self.chunks):
            scaled = k[:, :, : later + last] if self.is_aligned else k
            if self.key_factors:
                scaled = scale_keys(scaled, self.key_factors[i]).to(q.dtype)
            for start, stop in split_into_chunks(last - first, self.limit)[1]:
                start, stop = first + start, first + stop
                num_keys = later + stop if self.is_aligned else k.shape[2]
                part = q[:, :, start:stop], scaled[:, :, :num_keys], v[:, :, :num_keys]
                if table is not None:
                    outputs.append(flex_attention(*part, visibility, table, start))
                else:
                    terms = visibility.logit_terms(bias, (start, stop, num_keys), q.dtype)
                    outputs.append(softmax_attention(*part, terms, settings.dropout_p))
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return rearrange(attended, "b h n d -> b n h d")


def repeat_heads(t: Tensor, num_heads: int) -> Tensor:
    """Each head of t (b, g, m, d) for all query heads that share it: (b, h, m, d)."""
    return repeat(t, "b g m d -> b (g r) m d", r=num_heads // t.shape[1])


def scale_keys(k: Tensor, factor: Tensor) -> Tensor:
    """Keys (b, g, m, d) times a factor for each segment or each key (rows, 1, j, p or 1, d)."""
    return rearrange(rearrange(k, "b g (j p) d -> b g j p d", j=factor.shape[2]) * factor, "b g j p d -> b g (j p) d")


def split_into_chunks(n: int, limit: int) -> tuple[int, list[tuple[int, int]]]:
    """Chunks of at most `limit` of n queries: their size, and the first and last + 1 of each."""
    if n <= limit:
        return max(n, 1), [(0, n)]
    size, count = limit, -(-n // limit)
    if torch.compiler.is_compiling():
        # A graph for any length has 4, 16, 64, ... chunks, so that few graphs serve all lengths.
        power = GRAPH_GROWTH
        while n > power * limit:
            power *= GRAPH_GROWTH
        if n >= power * power:  # else some chunks would be empty
            size, count = -(-n // power), power
    starts = [i * size for i in range(count)]
    return size, list(zip(starts, [*starts[1:], n], strict=True))


def chunk_limit(settings: AttentionSettings, layout: BatchLayout, n: int) -> int:
    """How many of n queries attend at a time where attention needs `LogitTerms`, which are n x m."""
    if torch.compiler.is_compiling():
        return 2 * MASK_CHUNK
    fused = not settings.has_gain or use_flex(settings, n, layout.device, layout.dtype)
    return MASK_CHUNK if fused else GAIN_CHUNK


@dataclass(frozen=True, eq=False)
class DensePlan:
    """Every query on all keys before it.

    Attributes:
        q_rotary, k_rotary: rotate and scale queries and keys; keys of a cache, which are stored so, from the start of
            their segment; of a sequence in several origins, keys are rotated alone.
        chunks: how queries attend to keys.
        write: where new keys go in a cache; None without.
    """

    q_rotary: Rotary
    k_rotary: Rotary
    chunks: ChunkPlan
    write: WriteIndex | None

    @classmethod
    def make(cls, settings: AttentionSettings, layout: BatchLayout, cache: LayerCache | None) -> "DensePlan":
        n, positions, ids, device = layout.n, settings.positions, layout.document_ids, layout.device
        span = positions.max_span(layout.dtype)
        before = settings.num_before(n)
        needs_terms = settings.distance_bias is not None or ids is not None or cache is not None
        if not needs_terms and (before or n > span):
            needs_terms = not can_skip_mask(settings, layout)
        limit = chunk_limit(settings, layout, n) if needs_terms else NO_LIMIT
        size, chunks = split_into_chunks(n, origin_limit(span, limit))

        at, middle, num_keys, key_factors, write = layout.positions, size // 2, before + n, [], None
        length = 1 if cache is None else cache.segment_length
        if before:
            at = torch.arange(num_keys, device=device)[None]
        q_exponents = torch.arange(-before, n, device=device)[None]
        q_exponents = (q_exponents if len(chunks) == 1 else q_exponents % size) - middle
        k_exponents = -q_exponents if len(chunks) == 1 else None
        if cache is not None:
            num_keys = cache.num_used(layout.longest)
            k_exponents, write = -(at % length), WriteIndex.make(layout, cache.num_slots)
        if positions.decays and cache is not None:
            starts = torch.arange(0, num_keys, length, device=device)
            for first, _ in chunks:
                # Later segments than the chunk are hidden; held back, their factors do not overflow.
                distance = (layout.first + first + middle - starts).clamp(min=-middle)
                key_factors.append(per_channel(positions, distance, layout.dtype)[:, None])
        elif positions.decays and len(chunks) > 1:
            key_factors = sliding_factors(positions, chunks, size, layout, before)

        q_rotary, k_rotary = make_rotary(
            positions, at, q_exponents, k_exponents, query_factor(settings, at, layout), layout.dtype
        )
        q_ids = None if ids is None else ids[:, before:]
        visibility = Visibility(at[:, before:], num_keys, needs_terms, settings.pattern.window_size, q_ids, ids)
        flex = use_flex(settings, n, device, layout.dtype)
        few = n <= max(limit, MASK_CHUNK)
        visibility = visibility.prepare(settings.distance_bias, layout.dtype, few and not flex)
        chunk_plan = ChunkPlan(visibility, chunks, key_factors, limit, is_aligned=cache is None)
        return cls(q_rotary.after(before), k_rotary, chunk_plan, write)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, cache: LayerCache | None) -> Tensor:
        """Attention of q (b, n, h, d) on k, v (b, n, g, d), not yet rotated, and all before them: (b, n, h, d).

        With context parallelism, k and v have those of other ranks in front.
        """
        if cache is not None:
            if q.numel() == 0:
                return q
            assert self.write is not None
            cache.write(self.k_rotary.rotate(k), v, self.write)
            cache.commit()
            k, v = (
                rearrange(t[:, :, : self.chunks.visibility.num_keys], "b g s d -> b s g d") for t in (cache.k, cache.v)
            )
        elif self.chunks.key_factors:
            k = self.k_rotary.rotate(k.to(at_least_float32(k.dtype)))  # rounded once, with the factor
        else:
            k = self.k_rotary.rotate(k)
        return self.chunks.attend(self.q_rotary.rotate(q), k, v, settings)


def origin_limit(span: int, limit: int) -> int:
    """How many queries may share an origin. In compiled code, as many as attend at a time: fewer graphs."""
    return min(span, limit) if torch.compiler.is_compiling() else span


def sliding_factors(
    positions: PositionModule, chunks: list[tuple[int, int]], size: int, layout: BatchLayout, before: int = 0
) -> list[Tensor]:
    """For each chunk of queries, the decay of its keys from its middle: slices of one table, (1, 1, 1, m, d).

    Keys are those of all chunks so far and, with `before`, as many in front of them.
    """
    last, _ = chunks[-1]
    distance = before + last + size // 2 - torch.arange(before + last + size, device=layout.device)
    table = rearrange(per_channel(positions, distance, layout.dtype), "m 1 d -> 1 1 1 m d")
    return [table[:, :, :, last - first : before + last - first + stop] for first, stop in chunks]


def per_channel(positions: PositionModule, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Decay at distances (...), for each channel of keys (..., 1, d), in memory."""
    layout = "(i two)" if positions.interleaved else "(two i)"
    factor = repeat(positions.decay(distance, at_least_float32(dtype)), f"... i -> ... 1 {layout}", two=2)
    return materialise(factor)[0]


def query_factor(settings: AttentionSettings, at: Tensor, layout: BatchLayout) -> Tensor | None:
    """What queries at positions (rows, n) are multiplied by for the number of keys they see, (b or 1, n); or None."""
    if settings.query_scaling is None:
        return None
    return settings.query_scaling(
        settings.pattern.count_visible(at, layout.document_ids), at_least_float32(layout.dtype)
    )
