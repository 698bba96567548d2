"""Plans: what follows from positions, lengths and settings alone, made once per forward for all layers.

Axes: b batch, n sequence, c features.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from xpos_zoo.blockwise import BlockwisePlan, fetch_previous, prepend
from xpos_zoo.cache import KeyValueCache, LayerCache
from xpos_zoo.checks import require_integers
from xpos_zoo.decode import DecodePlan
from xpos_zoo.dense import DensePlan
from xpos_zoo.settings import AttentionSettings, BatchLayout, Padding


class CasePlan(Protocol):
    """`DensePlan`, `BlockwisePlan` or `DecodePlan`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, cache: LayerCache | None
    ) -> Tensor: ...


class LayerPlan:
    """How a layer attends in this forward, and its part of the cache. Not to be changed.

    A plain class: FSDP2's mixed precision would cast the tensors in a tuple or a dataclass, and so round the tables.

    Attributes:
        case: the plan of its case; layers with equal settings share it.
        key: those settings, as `AttentionSettings.plan_key` has them.
        padding: of the tokens, or None.
        cache: the layer's part of the cache, or None.
    """

    def __init__(self, case: CasePlan, key: tuple[Any, ...], padding: Padding | None, cache: LayerCache | None):
        self.case, self.key, self.padding, self.cache = case, key, padding, cache


def make_case(settings: AttentionSettings, layout: BatchLayout, cache: LayerCache | None) -> CasePlan:
    """The plan of the case that applies."""
    w = settings.pattern.row_length
    if cache is not None and layout.n == 1:
        return DecodePlan.make(settings, layout, cache)
    # In up to two blocks, or in one window, a query sees all keys before it.
    if w is not None and (cache or settings.cp_rank or layout.n > (2 * w if settings.pattern.block_size else w)):
        return BlockwisePlan.make(settings, layout, cache)
    return DensePlan.make(settings, layout, cache)


def plan_attention(
    blocks: Sequence[Any],
    x: Tensor,
    cache: KeyValueCache | None = None,
    *,
    lengths: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> list[LayerPlan]:
    """A plan for the `attend` of each of these `MultiHeadAttention` blocks, which layers of one model share.

        plans = plan_attention(blocks, x, cache)
        x = x + blocks[i].attend(norm(x), plans[i])  # in each layer
        cache.advance()  # after the last, if there is a cache

    Args:
        blocks: one for each layer.
        x: what the first layer is given, (b, n, embed_dim).
        cache: `KeyValueCache(blocks, batch_size)`, one for all of them.
        lengths, document_ids, key_padding_mask, errors: as `MultiHeadAttention.forward` has them.
    """
    if cache is not None and not isinstance(cache, KeyValueCache):
        raise ValueError(f"cache must be one of make_cache, got {type(cache).__name__}")
    if cache is not None and len(cache.layers) != len(blocks):
        raise ValueError(
            f"cache does not match the model: needs {len(blocks)} layers, was made with {len(cache.layers)}"
        )
    if x.ndim != 3 or x.shape[-1] != blocks[0].embed_dim:
        raise ValueError(f"x must have shape (batch, seq_len, embed_dim={blocks[0].embed_dim}), got {tuple(x.shape)}")
    b, n, _ = x.shape
    padding = None
    if key_padding_mask is not None:
        padding = make_padding(key_padding_mask, b, n)
        if lengths is not None:
            raise ValueError("lengths must be None with key_padding_mask, which says more")
        lengths = None if cache is None else (~key_padding_mask).sum(dim=1)
    if document_ids is not None:
        require_integers("document_ids", document_ids, x.shape[:2])
        if cache is not None:
            raise ValueError("document_ids must be None with a cache: each row of a cache is one document")
        if padding is not None:
            document_ids = document_ids.gather(1, padding.order[..., 0])
    check_context_parallel(blocks, n, cache, padding)
    # The meta device has no autocast. (`is_autocast_available` would break a graph of torch 2.11.)
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    layout = BatchLayout(b, n, dtype, x.device, counts=lengths, document_ids=document_ids, padding=padding)
    if cache is not None:
        for block, layer in zip(blocks, cache, strict=True):
            layer.check(block, b)
        layout = replace(layout, cached=cache.length, longest=cache.reserve(n, lengths))
    elif lengths is not None:
        raise ValueError("lengths must be None without a cache: causal attention never sees padding on the right")
    cases: dict[Any, CasePlan] = {}
    plans = []
    for i, block in enumerate(blocks):
        settings, layer = block.settings, None if cache is None else cache[i]
        key = settings.plan_key(dtype)
        if key not in cases:
            cases[key] = make_case(settings, with_previous_documents(layout, block), layer)
        plans.append(LayerPlan(cases[key], key, padding, layer))
    return plans


def make_padding(mask: Any, b: int, n: int) -> Padding:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (b, n):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"key_padding_mask must be bool of shape {(b, n)}, True for padding, got {got}")
    order = mask.to(torch.int8).argsort(dim=1, stable=True)
    return Padding(*(t[..., None] for t in (mask, order, order.argsort(dim=1))))


def check_context_parallel(blocks: Sequence[Any], n: int, cache: KeyValueCache | None, padding: Padding | None) -> None:
    if any(block.cp_mesh != blocks[0].cp_mesh for block in blocks):
        raise ValueError("cp_mesh must be the same in all layers: each gets a part of the tokens from the one before")
    for w, window in ((block.block_size, block.window_size) for block in blocks if block.cp_mesh is not None):
        if padding is not None:
            raise ValueError("key_padding_mask must be None with cp_mesh: tokens do not move to other ranks")
        if cache is not None:
            raise ValueError("cache must be None with cp_mesh: set that to None to decode")
        if w is not None and (n == 0 or n % w):
            raise ValueError(f"seq_len must be a multiple of block_size={w} with cp_mesh, got {n}")
        if n < (window or 1):
            least = "above 0" if window is None else f"at least window_size={window}"
            raise ValueError(f"seq_len must be {least} with cp_mesh, got {n}")


def with_previous_documents(layout: BatchLayout, block: Any) -> BatchLayout:
    """With context parallelism, also the document ids of the keys that other ranks have."""
    ids = layout.document_ids
    if ids is None or block.cp_mesh is None:
        return layout
    previous = fetch_previous(block.cp_mesh, block.settings.pattern.row_length, ids)
    return replace(layout, document_ids=prepend(previous, ids)[0])
