"""Dense causal attention at any length: every query sees every key up to its own position.

Axes: b batch, h heads, g key-value heads (h is a multiple of g), n sequence, d head dimension.
"""

from typing import Protocol

import torch
from einops import repeat
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERY_CHUNK = 1024  # queries at a time beyond the span of one origin: bounds the mask at 1024 x n


class PositionModule(Protocol):
    """What attention asks of a position encoding; `RotaryEmbedding` says what the methods mean."""

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]: ...

    def max_span(self, dtype: torch.dtype) -> int: ...


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """Softmax attention of q (b, h, n, d) on k, v (b, g, m, d): causal if mask is None, else where mask is True."""
    if mask is None:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout_p, enable_gqa=k.shape[1] != q.shape[1]
        )
    # With a mask, no fused CUDA kernel knows grouped heads.
    k, v = (repeat(t, "b g n d -> b (g r) n d", r=q.shape[1] // t.shape[1]) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, positions: PositionModule, dropout_p: float = 0.0) -> Tensor:
    """Causal attention of q (b, h, n, d), not yet rotated, on k, v (b, g, n, d); gives (b, h, n, d)."""
    n = q.shape[-2]
    if n > positions.max_span(q.dtype):
        return chunked_attention(q, k, v, positions, n, dropout_p)
    at = torch.arange(n, device=q.device)
    q, k = positions.rotate(q, k, at, at, origin=n // 2)
    return attend(q, k, v, None, dropout_p)


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: PositionModule, block_size: int, dropout_p: float = 0.0
) -> Tensor:
    """Attention to one's own block causally and to all of the block before it, some queries at a time.

    Each chunk of queries takes the positions of all keys that it sees from an origin in its own middle: no factor
    grows with the distance that way, and those of far keys vanish as the scores do. With block_size n this is dense.
    """
    n = q.shape[-2]
    chunk = min(positions.max_span(q.dtype), QUERY_CHUNK)
    at = torch.arange(n, device=q.device)
    outputs = []
    for block in range(0, n, block_size):
        block_end = min(block + block_size, n)
        for start in range(block, block_end, chunk):
            end = min(start + chunk, block_end)
            rows, seen = slice(start, end), slice(max(block - block_size, 0), end)
            q_chunk, k_seen = positions.rotate(
                q[..., rows, :], k[..., seen, :], at[rows], at[seen], origin=(start + end) // 2
            )
            mask = at[seen] <= at[rows, None]
            outputs.append(attend(q_chunk, k_seen, v[..., seen, :], mask, dropout_p))
    return torch.cat(outputs, dim=-2)
