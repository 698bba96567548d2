"""Decoding: one new token per row on what a cache holds.

Axes: b batch, h heads, g key-value heads, r = h/g, d head dimension, s slots, j segments of p slots.

A key is stored with its decay from the start of its segment. So the query comes in one copy for each segment, scaled by
its own decay from there: real factors, and no key is touched.
"""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from xpos_zoo.bias import bias_and_gain
from xpos_zoo.cache import LayerCache, WriteIndex
from xpos_zoo.dense import per_channel, query_factor
from xpos_zoo.rotary import Rotary, make_rotary
from xpos_zoo.rotation import at_least_float32
from xpos_zoo.settings import AttentionSettings, BatchLayout
from xpos_zoo.visibility import LogitTerms

SEGMENTS_AT_ONCE = 64  # whose keys are converted to float32 at a time: never the whole cache


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """One query per row, on the slots of a cache, dense or local.

    Attributes:
        q_rotary, k_rotary: rotate and scale the new query and key, the key for its segment.
        segment_factors: of the query for each segment, (b, j, 1, d); None without decay.
        write: where the new key goes.
        q_positions, k_positions: of the query, (b, 1), and of the newest key in each slot, (b, s); below 0 for none.
        terms: of the logits, if all layers share them.
    """

    q_rotary: Rotary
    k_rotary: Rotary
    segment_factors: Tensor | None
    write: WriteIndex
    q_positions: Tensor
    k_positions: Tensor
    terms: LogitTerms | None

    @classmethod
    def make(cls, settings: AttentionSettings, layout: BatchLayout, cache: LayerCache) -> "DecodePlan":
        at, positions, length = layout.positions, settings.positions, cache.segment_length
        slot = torch.arange(cache.num_used(layout.longest), device=layout.device)
        k_positions = at - (at - slot) % cache.num_slots
        segment_factors = None
        if positions.decays:
            # A segment starts where its first slot's key is: the others that are visible came after. One without a
            # visible key may start after the query.
            segment_factors = per_channel(positions, (at - k_positions[:, ::length]).clamp(min=0), layout.dtype)
        q_rotary, k_rotary = make_rotary(
            positions, at, None, -(at % length), query_factor(settings, at, layout), layout.dtype
        )
        write = WriteIndex.make(layout, cache.num_slots)
        plan = cls(q_rotary, k_rotary, segment_factors, write, at, k_positions, None)
        return plan if settings.has_learned_bias else replace(plan, terms=plan.logit_terms(settings))

    def logit_terms(self, settings: AttentionSettings) -> LogitTerms:
        """Of all slots, (b, h or 1, 1, s)."""
        visible = settings.pattern.is_visible(self.q_positions, self.k_positions)
        distance = (self.q_positions - self.k_positions).clamp(min=0)
        bias, gain = bias_and_gain(settings.distance_bias, distance[:, None, None])
        return LogitTerms(torch.where(visible[:, None, None], bias, -torch.inf), gain)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, cache: LayerCache | None) -> Tensor:
        """Attention of q (b, 1, h, d) on the new k, v (b, 1, g, d), not yet rotated, and the cache: (b, 1, h, d)."""
        assert cache is not None
        if q.numel() == 0:
            return q
        cache.write(self.k_rotary.rotate(k), v, self.write)
        cache.commit()
        if self.segment_factors is None:
            queries = self.q_rotary.rotate(q)
        else:
            queries = (self.q_rotary.rotate(q.to(at_least_float32(q.dtype))) * self.segment_factors).to(q.dtype)
        terms, s = self.terms or self.logit_terms(settings), self.k_positions.shape[1]
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores
            queries = rearrange(queries, "b j (g r) d -> b g j r d", g=k.shape[2])
            keys = rearrange(cache.k[:, :, :s], "b g (j p) d -> b g j p d", j=queries.shape[2])
            scores = rearrange(products(queries, keys), "b g j r p -> b (g r) 1 (j p)") / q.shape[-1] ** 0.5
            scores = scores if terms.gain is None else scores * terms.gain
            weights = (scores + terms.bias).softmax(-1).to(q.dtype)
            attended = rearrange(weights, "b (g r) 1 s -> b g r s", g=k.shape[2]) @ cache.v[:, :, :s]
        return rearrange(attended, "b g r d -> b 1 (g r) d")


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """Products of queries (b, g, j, r, d) and keys (b, g, j, p, d), (b, g, j, r, p), in float32 at least."""
    dtype = at_least_float32(keys.dtype)
    if keys.dtype == dtype:
        return queries @ keys.mT
    if torch.compiler.is_compiling():  # becomes one kernel
        return (queries[..., :, None, :].to(dtype) * keys[..., None, :, :].to(dtype)).sum(-1)
    if keys.device.type == "cuda":
        flat = torch.bmm(queries.flatten(0, 2), keys.flatten(0, 2).mT, out_dtype=dtype)
        return flat.view(*queries.shape[:-1], keys.shape[-2])
    pieces = zip(queries.split(SEGMENTS_AT_ONCE, 2), keys.split(SEGMENTS_AT_ONCE, 2), strict=True)
    return torch.cat([a.to(dtype) @ b.to(dtype).mT for a, b in pieces], dim=2)
