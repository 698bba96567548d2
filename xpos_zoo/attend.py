"""Attention by a plan: chunks of queries on windows of keys.

Axes: b batch, n queries, m keys, h heads, g key-value heads, r = h/g, d head dimension, j blocks or parts, w tokens in
a block, p keys in a part, s slots of a cache. Heads stand behind the sequence, as projections leave them, so that
blocks are views and attention's output is not copied.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from xpos_zoo.cache import LayerCache
from xpos_zoo.plan import Pattern, Plan, Window, block_count, chunks, flexible, known
from xpos_zoo.rotary import at_least_float32

PARTS_AT_ONCE = 64  # whose keys are converted to float32 at a time: never the whole cache


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    pattern: Pattern,
    cache: LayerCache | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal attention of q (b, n, h, d) on k, v (b, n, g, d), not yet rotated: (b, n, h, d).

    If the pattern is preceded, k and v (b, w + n, g, d) have a block before the queries'.

    Args:
        plan: made for these shapes.
        pattern: the layer's own; its bias may have parameters of the layer.
        cache: the layer's; k and v are appended to it (blocks await `commit`), and q attends to all that it holds.
    """
    rotated, blocks = pattern.positions.rotated, len(plan.windows) > 1
    if cache is not None:
        if q.numel() == 0:
            return q
        assert plan.slots is not None
        cache.write(rotated(k, plan.slots.table, inverse=True), v, plan.slots)
    if blocks:
        return attend_blocks(q, k, v, plan, pattern, cache, dropout_p)
    if cache is None:
        k = rotated(k, plan.k_table, inverse=True)
    else:
        cache.commit()
        s = plan.windows[0].k_at.shape[-1]
        k, v = (rearrange(t[:, :, :s], "b g s d -> b s g d") for t in (cache.k, cache.v))
        if q.shape[1] == 1:
            return attend_parts(q, k, v, plan, pattern)
    return attend_window(rotated(q, plan.q_table), k, v, plan.windows[0], plan, pattern, dropout_p)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, pattern: Pattern, cache: LayerCache | None, dropout_p: float
) -> Tensor:
    """Blockwise causal attention (BCA; Sun et al. 2022, section 3.2): linear in length, every position block-local."""
    assert pattern.block_size is not None
    w, n, slots, rotated = pattern.block_size, q.shape[1], plan.slots, pattern.positions.rotated
    if cache is None or slots is None or slots.places is None:
        q, k, v = (pad(t, (0, 0, 0, 0, 0, block_count(n, w, False) * w - n)) for t in (q, k, v))
    else:
        old_k, old_v = (rearrange(t, "b g s d -> b s g d") for t in (cache.k, cache.v))
        old_k = rotated(old_k, slots.restore, inverse=True)
        k, v = (gathered(torch.cat(t, dim=1), slots.places) for t in ((old_k, k), (old_v, v)))
        q = gathered(q, (slots.places - cache.slots).clamp(min=0))
    q, k, v = (rearrange(t, "b (j w) h d -> b j w h d", w=w) for t in (q, k, v))
    q, before = rotated(q, plan.q_table), k
    if plan.k_table is not None:
        before, k = (rotated(k, plan.k_table[:, part], inverse=True) for part in (slice(0, w), slice(-w, None)))
    run = partial(attend_window, plan=plan, pattern=pattern, dropout_p=dropout_p)
    seen = (torch.cat((t[:, :-1], own[:, 1:]), dim=2) for t, own in ((before, k), (v, v)))
    rest = (rearrange(t, "b j w h d -> (b j) w h d") for t in (q if pattern.preceded else q[:, 1:], *seen))
    attended = rearrange(run(*rest, window=plan.windows[1]), "(b j) w h d -> b (j w) h d", j=k.shape[1] - 1)
    if not pattern.preceded:
        attended = torch.cat((run(q[:, 0], k[:, 0], v[:, 0], plan.windows[0]), attended), dim=1)
    return attended[:, :n] if slots is None or slots.asked is None else gathered(attended, slots.asked)


def gathered(t: Tensor, index: Tensor) -> Tensor:
    """Of each row of t (b, m, h, d) the tokens index (b, n): (b, n, h, d)."""
    return t.gather(1, repeat(index, "b n -> b n h d", h=t.shape[2], d=t.shape[3]))


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, window: Window, plan: Plan, pattern: Pattern, dropout_p: float = 0.0
) -> Tensor:
    """Attention of rotated q (b, n, h, d) to what the window shows of k, v (b, m, g, d), a chunk of queries at a time.

    With shifts, each chunk measures positions from its own middle: factors of far keys vanish as their scores do.
    """
    n, m = q.shape[1], k.shape[1]
    outputs = []
    for i, (start, end) in enumerate(chunks(n, plan.chunk)):
        rows = slice(start, end)
        keys = slice(0, m if window.q_at.ndim > 1 else m - n + end)
        seen = k[:, keys]
        if window.shifts is not None:
            seen = shifted(seen, window.shifts[i], plan.part, pattern)
        if not dropout_p and flexible(pattern, n, q.device, q.dtype):
            outputs.append(flex_attention(q[:, rows], seen, v[:, keys], window.score_mod(rows, keys, pattern)))
            continue
        mask, gain = window.logits_by_distance(rows, keys, pattern, q.dtype)
        outputs.append(softmax_attention(q[:, rows], seen, v[:, keys], mask, gain, dropout_p))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def shifted(k: Tensor, table: Tensor, p: int, pattern: Pattern) -> Tensor:
    """Keys (b, m, g, d), rotated relative to the starts of their parts of p keys, rotated on by a table of parts."""
    m = k.shape[1]
    k = k if known(m % p == 0) else pad(k, (0, 0, 0, 0, 0, -m % p))
    parts = rearrange(k, "b (j p) g d -> b j p g d", p=p)
    parts = pattern.positions.rotated(parts, table[..., : parts.shape[1], :, :, :], inverse=True)
    return rearrange(parts, "b j p g d -> b (j p) g d")[:, :m]


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gain: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Softmax attention of q (b, n, h, d) to k, v (b, m, g, d): (b, n, h, d).

    Scaled scores are multiplied by the gain, and the mask is added. Without one it is causal, and the last query sees
    the last key.
    """
    if gain is not None and mask is not None:
        return gained_attention(q, k, v, mask, gain, dropout_p)
    q, k, v = (rearrange(t, "b n h d -> b h n d") for t in (q, k, v))
    cuda, grouped = q.device.type == "cuda", k.shape[1] != q.shape[1]
    if mask is None and q.shape[2] != k.shape[2]:
        # Private, for torch's public name of this kernel, causal_lower_right, cannot be used inside a graph.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return rearrange(flash(q, k, v, dropout_p, True)[0], "b h n d -> b n h d")
    # With a mask, or in float32, no fused CUDA kernel knows grouped heads.
    if grouped and (mask is not None or (cuda and q.dtype == torch.float32)):
        k, v = (repeat(t, "b g n d -> b (g r) n d", r=q.shape[1] // t.shape[1]) for t in (k, v))
        grouped = False
    # Not cuDNN, which takes a hidden score for -65504: xPos gives less far in the future (pytorch #177842).
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    mask = mask.to(q.dtype) if mask is not None and cuda else mask  # the plan's may be of another layer's dtype
    # Autocast would round the mask.
    with sdpa_kernel(backends) if cuda else nullcontext(), torch.autocast(q.device.type, enabled=False):
        out = scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout_p, is_causal=mask is None, enable_gqa=bool(grouped)
        )
    return rearrange(out, "b h n d -> b n h d")


def flex_attention(q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor]) -> Tensor:
    """Attention of q (b, n, h, d) to k, v (b, m, g, d) whose scaled scores `score_mod` changes and hides."""
    q, k, v = (rearrange(t, "b n h d -> b h n d") for t in (q, k, v))
    eager = not torch.compiler.is_compiling() and q.device.type == "cuda"
    with torch.autocast(q.device.type, enabled=False):
        out = (compiled_flex() if eager else flex.flex_attention)(
            q, k, v, score_mod, enable_gqa=k.shape[1] != q.shape[1]
        )
    return rearrange(out, "b h n d -> b n h d")


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention)


def gained_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, gain: Tensor, dropout_p: float) -> Tensor:
    """As `softmax_attention`, in plain products: no fused kernel multiplies scores."""
    g, r, dtype = k.shape[2], q.shape[2] // k.shape[2], at_least_float32(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        k, v = (rearrange(t, "b m g d -> b g m d") for t in (k, v))
        q = rearrange(q, "b n (g r) d -> b g (r n) d", g=g)
        scores = rearrange(q.to(dtype) @ k.to(dtype).mT, "b g (r n) m -> b (g r) n m", r=r)
        weights = (scores * (gain / q.shape[-1] ** 0.5) + mask).softmax(-1).to(v.dtype)
        weights = rearrange(dropout(weights, dropout_p), "b (g r) n m -> b g (r n) m", g=g)
        return rearrange(weights @ v, "b g (r n) d -> b n (g r) d", r=r)


def attend_parts(q: Tensor, k: Tensor, v: Tensor, plan: Plan, pattern: Pattern) -> Tensor:
    """One query a row (b, 1, h, d), not yet rotated, in a version for each part, on slots k, v (b, s, g, d)."""
    g, window = k.shape[2], plan.windows[0]
    parts = 1 if plan.q_table is None else plan.q_table.shape[2]
    versions = q if plan.q_table is None else pattern.positions.rotated(q, plan.q_table)
    mask, gain = window.logits_by_distance(slice(None), slice(None), pattern, q.dtype)
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        versions = rearrange(versions, "b j (g r) d -> b g j r d", g=g)
        scores = products(versions, rearrange(k, "b (j p) g d -> b g j p d", j=parts)) / q.shape[-1] ** 0.5
        scores = rearrange(scores, "b g j r p -> b (g r) 1 (j p)")
        scores = scores if gain is None else scores * gain
        weights = rearrange((scores + mask).softmax(-1).to(q.dtype), "b (g r) 1 s -> b g r s", g=g)
        attended = weights @ rearrange(v, "b s g d -> b g s d")
    return rearrange(attended, "b g r d -> b 1 (g r) d")


def products(versions: Tensor, keys: Tensor) -> Tensor:
    """Products of queries (b, g, j, r, d) and keys (b, g, j, p, d), (b, g, j, r, p), in float32 at least."""
    dtype = at_least_float32(keys.dtype)
    if keys.dtype == dtype:
        return versions @ keys.mT
    if torch.compiler.is_compiling():  # becomes one kernel
        return (versions[..., :, None, :].to(dtype) * keys[..., None, :, :].to(dtype)).sum(-1)
    if keys.device.type == "cuda":
        flat = torch.bmm(versions.flatten(0, 2), keys.flatten(0, 2).mT, out_dtype=dtype)
        return flat.view(*versions.shape[:-1], keys.shape[-2])
    pieces = zip(versions.split(PARTS_AT_ONCE, 2), keys.split(PARTS_AT_ONCE, 2), strict=True)
    return torch.cat([a.to(dtype) @ b.to(dtype).mT for a, b in pieces], dim=2)
