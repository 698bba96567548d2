"""Dense causal attention at any length: every query sees every key up to its own position.

Axes: b batch, h heads, g key-value heads (h is a multiple of g), n queries, m keys, d head dimension.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from einops import repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from xpos_zoo.bias import DistanceBias
from xpos_zoo.rotary import at_least_float32

QUERY_CHUNK = 1024  # queries at a time where there is a mask: bounds it at 1024 x m

# Which keys (a slice of them) some queries (a slice, too) look at, and where in there they see: (..., n, m), True.
Window = Callable[[slice], tuple[slice, Tensor]]


class PositionModule(Protocol):
    """What attention asks of a position encoding; `RotaryEmbedding` says what the methods mean.

    It may also have a method `distance_bias(distance)`, which is a `DistanceBias`, for every head alike or with an axis
    of heads, (h, n, m), as ALiBi's is.
    """

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]: ...

    def max_span(self, dtype: torch.dtype) -> int: ...


def distance_bias_of(positions: PositionModule) -> DistanceBias | None:
    return getattr(positions, "distance_bias", None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float = 0.0) -> Tensor:
    """Softmax attention of q (b, h, n, d) on k, v (b, g, m, d).

    It is causal if mask is None, else where mask is True; a mask of floating-point numbers is added to the logits.
    """
    cuda = q.device.type == "cuda"
    grouped = k.shape[1] != q.shape[1]
    # With a mask, or in float32, no fused CUDA kernel knows grouped heads.
    if grouped and (mask is not None or (cuda and q.dtype == torch.float32)):
        k, v = (repeat(t, "b g n d -> b (g r) n d", r=q.shape[1] // t.shape[1]) for t in (k, v))
        grouped = False
    if mask is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p, enable_gqa=grouped)
    # cuDNN takes a hidden score for -65504, which is not below what xPos gives far in the future (pytorch #177842).
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if cuda else nullcontext():
        if mask.dtype == torch.bool:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        # On the CPU a mask may be more precise than q. CUDA's memory-efficient kernel wants q's dtype, so that there a
        # bias is rounded: one of 10 by up to 0.03 in bfloat16, 0.004 in float16.
        mask = mask.to(q.dtype if cuda else at_least_float32(q.dtype))
        with torch.autocast(q.device.type, enabled=False):  # it would round the mask
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: PositionModule,
    dropout_p: float = 0.0,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Causal attention of q (b, h, n, d), not yet rotated, on k, v (b, g, n, d); gives (b, h, n, d).

    Only within documents if document_ids (b, n) tells them apart.
    """
    n = q.shape[-2]
    at = torch.arange(n, device=q.device)
    if document_ids is None and distance_bias_of(positions) is None and n <= positions.max_span(q.dtype):
        q, k = positions.rotate(q, k, at, at, origin=n // 2)
        return attend(q, k, v, None, dropout_p)

    def window(rows: slice) -> tuple[slice, Tensor]:
        keys = slice(0, rows.stop)
        mask = at[keys] <= at[rows, None]
        if document_ids is not None:
            mask = mask & same_document(document_ids[:, rows], document_ids[:, keys])
        return keys, mask

    return attend_windows(q, k, v, positions, at, at, window, dropout_p)


def same_document(q_ids: Tensor, k_ids: Tensor) -> Tensor:
    """Whether queries and keys with ids (b, n) and (b, m) belong together: (b, 1, n, m)."""
    return (q_ids[:, :, None] == k_ids[:, None, :])[:, None]


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: PositionModule,
    q_at: Tensor,
    k_at: Tensor,
    window: Window,
    dropout_p: float = 0.0,
    k_turned: Tensor | int = 0,
) -> Tensor:
    """Attention of q (b, h, n, d) on what `window` shows of k, v (b, g, m, d), some queries at a time.

    Each chunk of queries takes all positions from an origin in its own middle: no factor grows with the distance that
    way, and those of far keys vanish as the scores do.

    Args:
        q_at: positions of q, (n,) or with leading dimensions as `PositionModule.rotate` has it.
        k_at: those of k, (m,) likewise.
        k_turned: by how many of them k is rotated already.
    """
    n = q.shape[-2]
    chunk = len(range(min(positions.max_span(q.dtype), QUERY_CHUNK)))  # a compiler takes lengths as plain numbers
    bias = distance_bias_of(positions)

    def attend_chunk(start: int, end: int) -> Tensor:
        rows = slice(start, end)
        keys, mask = window(rows)
        if bias is not None:
            distance = q_at[..., rows, None] - k_at[..., None, keys]
            mask = torch.where(mask, bias(distance[(None,) * (4 - distance.ndim)]), -torch.inf)
        q_positions = q_at[..., rows]
        # Keys later than all these queries are hidden; held back, they do not overflow.
        k_positions = (k_at.minimum(q_at[..., end - 1 : end]) - k_turned)[..., keys]
        middle = (start + end) // 2
        q_chunk, k_seen = positions.rotate(
            q[..., rows, :], k[..., keys, :], q_positions, k_positions, q_at[..., middle : middle + 1]
        )
        return attend(q_chunk, k_seen, v[..., keys, :], mask, dropout_p)

    if n <= chunk:
        return attend_chunk(0, n)
    starts = [i * chunk for i in range(-(-n // chunk))]  # in a graph this fixes their number, but not n
    return torch.cat([attend_chunk(*ends) for ends in zip(starts, [*starts[1:], n], strict=True)], dim=-2)
