"""Local attention: blockwise causal attention (BCA; Sun et al. 2022, section 3.2) and sliding windows.

In blocks of w tokens, a query sees its own block and all of the one before; with a window of w, the last w tokens. Both
ways a sequence becomes rows of the batch, of w queries on 2 w keys, of which a window hides those that are too far. The
first row, which has none before it, is attended to apart. So cost is linear in length. With context parallelism, each
rank holds a part of a sequence, and gets the last w tokens of the rank before.

Axes: b batch, n tokens, w tokens in a block, j blocks, h heads, g key-value heads, d head dimension, s slots of a
cache; rows is b, or 1 where all rows of the batch are alike.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from xpos_zoo.cache import LayerCache, WriteIndex
from xpos_zoo.dense import (
    MASK_CHUNK,
    NO_LIMIT,
    ChunkPlan,
    chunk_limit,
    origin_limit,
    per_channel,
    query_factor,
    sliding_factors,
    split_into_chunks,
)
from xpos_zoo.flex import use_flex
from xpos_zoo.rotary import Rotary, make_rotary
from xpos_zoo.rotation import at_least_float32
from xpos_zoo.settings import AttentionSettings, BatchLayout, statically_true
from xpos_zoo.softmax import can_skip_mask
from xpos_zoo.visibility import Visibility


@dataclass(frozen=True, eq=False)
class BlocksFromCache:
    """How new tokens and those of a cache make blocks, in each row from the first block that a new token sees.

    Attributes:
        source_index: which token stands at each place of the blocks, (b, j w): a slot of the cache or, from s on, a new
            token.
        output_index: at which place each new token stands, (b, n).
        old_key_factors: what takes the decay from cached keys, (1, s, 1, d); None without decay.
        new_key_factors: what gives it to new ones, which are stored, (b, n, 1, d); None without decay.
        write: where new keys go.
    """

    source_index: Tensor
    output_index: Tensor
    old_key_factors: Tensor | None
    new_key_factors: Tensor | None
    write: WriteIndex


@dataclass(frozen=True, eq=False)
class BlockwisePlan:
    """Blocks of queries, each on its own keys and those of the block before.

    Attributes:
        q_rotary, k_rotary: rotate queries and keys; queries are scaled, too.
        num_padding: tokens that are missing from the last block.
        key_factors: of the keys of both blocks, (1, 2 w, 1, d), if they share an origin; else None.
        first: how the first block attends, if none comes before it.
        rest: how the others do.
        from_cache: how a cache's keys come in; None without.
    """

    q_rotary: Rotary
    k_rotary: Rotary
    num_padding: int
    key_factors: Tensor | None
    first: ChunkPlan
    rest: ChunkPlan
    from_cache: BlocksFromCache | None

    @classmethod
    def make(cls, settings: AttentionSettings, layout: BatchLayout, cache: LayerCache | None) -> "BlockwisePlan":
        pattern, positions, n = settings.pattern, settings.positions, layout.n
        w, before = pattern.row_length, settings.num_before(n)
        assert w is not None
        span, device = positions.max_span(layout.dtype), layout.device
        from_cache = None if cache is None else cls._from_cache(settings, layout, cache)
        num_blocks = count_blocks(before + n, w) if from_cache is None else from_cache.source_index.shape[1] // w
        must_mask = settings.distance_bias is not None or layout.document_ids is not None
        needs_terms = must_mask or pattern.window_size is not None or not can_skip_mask(settings, layout)
        limit = chunk_limit(settings, layout, w) if needs_terms else NO_LIMIT
        size, chunks = split_into_chunks(w, w if 2 * w <= span else origin_limit(span, limit))

        at = torch.arange(before + n, device=device)[None] if cache is None else layout.positions
        key_factors, factors = None, []
        q_exponents = (at if from_cache is None else from_cache.output_index) % w
        if 2 * w > span:
            q_exponents = q_exponents % size - size // 2
            factors = sliding_factors(positions, chunks, size, layout, before=w)
        elif positions.decays:  # the origin is where the query's block begins
            key_factors = per_channel(positions, (w - torch.arange(2 * w, device=device))[None], layout.dtype)
        q_rotary, k_rotary = make_rotary(
            positions, at, q_exponents, None, query_factor(settings, at, layout), layout.dtype
        )
        ids = None if layout.document_ids is None else document_blocks(layout.document_ids, w, num_blocks)
        own = None if ids is None else ids[:, 0]
        pairs = (
            (None, None)
            if ids is None
            else (ids[:, 1:].flatten(0, 1), torch.cat((ids[:, :-1], ids[:, 1:]), dim=-1).flatten(0, 1))
        )
        place = torch.arange(2 * w, device=device)[None]
        first = Visibility(
            place[:, :w], w, must_mask or (needs_terms and len(chunks) > 1), pattern.window_size, own, own
        )
        rest = Visibility(place[:, w:], 2 * w, needs_terms, pattern.window_size, *pairs)
        keep_terms = w <= MASK_CHUNK and not use_flex(settings, w, device, layout.dtype)
        first, rest = (each.prepare(settings.distance_bias, layout.dtype, keep_terms) for each in (first, rest))
        return cls(
            q_rotary.after(before),
            k_rotary,
            0 if cache is not None else num_blocks * w - before - n,
            key_factors,
            ChunkPlan(first, chunks, [factor[:, :, :, w:] for factor in factors], limit),
            ChunkPlan(rest, chunks, factors, limit),
            from_cache,
        )

    @staticmethod
    def _from_cache(settings: AttentionSettings, layout: BatchLayout, cache: LayerCache) -> BlocksFromCache:
        w, positions, n, at = settings.pattern.row_length, settings.positions, layout.n, layout.positions
        assert w is not None
        assert layout.cached is not None
        first = layout.cached[:, None]
        start = settings.pattern.start(first)
        most_before = w - 1 if settings.pattern.block_size is None else 2 * w - 1
        place = start + torch.arange((n + most_before + w - 1) // w * w, device=layout.device)
        # Places after a row's last token repeat it, for padding may hold anything; their outputs are dropped.
        most = n - 1 if layout.counts is None else layout.counts[:, None] - 1
        token = (place - first).clamp(max=most)  # type: ignore[arg-type]
        old = new = None
        if positions.decays:
            in_segment = torch.arange(cache.num_slots, device=layout.device)[None] % cache.segment_length
            old = per_channel(positions, in_segment, layout.dtype)
            new = per_channel(positions, -(at % cache.segment_length), layout.dtype)
        return BlocksFromCache(
            torch.where(token < 0, place % cache.num_slots, cache.num_slots + token),
            at - start,
            old,
            new,
            WriteIndex.make(layout, cache.num_slots),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, cache: LayerCache | None) -> Tensor:
        """Attention of q (b, n, h, d) on k, v (b, n, g, d), not yet rotated, and on the block before: (b, n, h, d).

        With a previous block, k and v (b, w + n, g, d) have it in front.
        """
        if cache is not None and q.numel() == 0:
            return q
        w, n, blocks, dtype = settings.pattern.row_length, q.shape[1], self.from_cache, q.dtype
        if settings.positions.decays:
            k = k.to(at_least_float32(dtype))  # rounded once, with the factor
        q, k = self.q_rotary.rotate(q), self.k_rotary.rotate(k)
        if blocks is not None:
            assert cache is not None
            q, k, v = join_with_cache(q, k, v, blocks, cache)
        else:
            q, k, v = (pad(t, (0, 0, 0, 0, 0, self.num_padding)) for t in (q, k, v))
        q, k, v = (rearrange(t, "b (j w) h d -> b j w h d", w=w) for t in (q, k, v))
        previous, own = k[:, :-1], k
        if self.key_factors is not None:
            previous = (previous * self.key_factors[:, :w]).to(dtype)
            own = (own * self.key_factors[:, w:]).to(dtype)
        has_first = settings.cp_rank == 0
        rest = q[:, 1:] if has_first else q, torch.cat((previous, own[:, 1:]), 2), torch.cat((v[:, :-1], v[:, 1:]), 2)
        rest_q, rest_k, rest_v = (rearrange(t, "b j w h d -> (b j) w h d") for t in rest)
        attended = self.rest.attend(rest_q, rest_k, rest_v, settings)
        attended = rearrange(attended, "(b j) w h d -> b (j w) h d", j=k.shape[1] - 1)
        if has_first:
            first = self.first.attend(q[:, 0], own[:, 0], v[:, 0], settings)
            attended = torch.cat((first, attended), dim=1)
        return attended[:, :n] if blocks is None else gather_tokens(attended, blocks.output_index)


def join_with_cache(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlocksFromCache, cache: LayerCache
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of the blocks, (b, j w, heads, d), from new ones (b, n, heads, d), rotated, and those of the cache.

    New ones are handed to the cache.
    """
    stored = k if blocks.new_key_factors is None else (k * blocks.new_key_factors).to(v.dtype)
    cache.write(stored, v, blocks.write)
    old_k, old_v = (rearrange(t, "b g s d -> b s g d") for t in (cache.k, cache.v))
    old_k = old_k if blocks.old_key_factors is None else old_k * blocks.old_key_factors
    k, v = (gather_tokens(torch.cat(t, dim=1), blocks.source_index) for t in ((old_k, k), (old_v, v)))
    return gather_tokens(q, (blocks.source_index - cache.num_slots).clamp(min=0)), k, v


def gather_tokens(t: Tensor, index: Tensor) -> Tensor:
    """Of each row of t (b, m, h, d) the tokens index (b, n): (b, n, h, d)."""
    return t.gather(1, repeat(index, "b n -> b n h d", h=t.shape[2], d=t.shape[3]))


def document_blocks(ids: Tensor, w: int, num_blocks: int) -> Tensor:
    """Document ids (b, n) of whole blocks, (b, j, w)."""
    return rearrange(pad(ids, (0, num_blocks * w - ids.shape[1])), "b (j w) -> b j w", w=w)


def count_blocks(n: int, w: int) -> int:
    """Blocks of w tokens for n of them."""
    if not torch.compiler.is_compiling():
        return -(-n // w)
    # A graph for any length takes a block too many: else there would be one graph more. Not `- statically_true(...)`:
    # torch 2.11 and 2.12 cannot subtract a bool from a symbolic integer.
    return n // w if statically_true(n % w == 0) else n // w + 1


def fetch_previous(mesh: DeviceMesh, w: int | None, *tensors: Tensor) -> Tensor:
    """The last w tokens that the rank before has of each of these tensors (b, n, ...), or, if w is None, all that the
    ranks before have: (m, b, w, ...) for m tensors, (m, b, 0, ...) on the first rank.

    All ranks must call it, with as many tensors of the same shape. For w, one message goes to the next rank, and one
    comes back with its gradients, else all ranks send all they have. It is waited for when it is first read.
    """
    # Private, but what torch names in place of its public functions that differentiate: those are deprecated, and break
    # graphs.
    from torch.distributed import _functional_collectives as collectives

    rank, size = mesh.get_local_rank(), mesh.size()
    if w is None:
        name = "all_gather_single_autograd"  # as of torch 2.13
        gather = getattr(collectives, name, None) or collectives.all_gather_tensor_autograd
        parts = gather(torch.stack(tensors), 0, mesh)
        parts = rearrange(parts, "(r m) b n ... -> r m b n ...", m=len(tensors))[:rank]
        return rearrange(parts, "r m b n ... -> m b (r n) ...")
    sent, received = ([w * (to == rank + step) for to in range(size)] for step in (1, -1))
    last = rearrange([t[:, -w:] for t in tensors], "m b w ... -> w m b ...")[: sum(sent)]
    return rearrange(
        collectives.all_to_all_single_autograd(last.contiguous(), received, sent, mesh), "w m b ... -> m b w ..."
    )


def prepend(previous: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors (b, n, ...), each after its part of what `fetch_previous` gave."""
    return [torch.cat(pair, dim=1) for pair in zip(previous.unbind(), tensors, strict=True)]
