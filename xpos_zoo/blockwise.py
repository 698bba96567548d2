"""Blockwise causal attention (BCA; Sun et al. 2022, section 3.2): linear in length, every position block-local.

The sequence is cut into blocks of w tokens. A query sees its own block causally and all of the block before it.

Axes: b batch, h heads (those of q, or the fewer of k and v), j blocks, w tokens in a block, n = j w, d head dimension.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from xpos_zoo.dense import PositionModule, attend, chunked_attention, dense_attention


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: PositionModule, block_size: int, dropout_p: float = 0.0
) -> Tensor:
    """Blockwise causal attention of q (b, h, n, d), not yet rotated, on k, v (b, g, n, d); gives (b, h, n, d)."""
    n, w = q.shape[-2], block_size
    if n <= 2 * w:  # every query sees all keys before it
        return dense_attention(q, k, v, positions, dropout_p)
    if w > positions.max_span(q.dtype):
        return chunked_attention(q, k, v, positions, w, dropout_p)

    def blocks(t: Tensor) -> Tensor:
        return rearrange(t, "b h (j w) d -> (b j) h w d", w=w)

    b, j = q.shape[0], (n - 1) // w  # j blocks after the first
    q, k, v = (pad(t, (0, 0, 0, (j + 1) * w - n)) for t in (q, k, v))
    first = dense_attention(q[..., :w, :], k[..., :w, :], v[..., :w, :], positions, dropout_p)

    # All other blocks at once: w queries against 2 w keys, from an origin in the middle of the queries' block.
    q = blocks(q[..., w:, :])
    k, v = (torch.cat((blocks(t[..., :-w, :]), blocks(t[..., w:, :])), dim=-2) for t in (k, v))
    at = torch.arange(-w, w, device=q.device)
    q, k = positions.rotate(q, k, at[w:], at, origin=w // 2)
    rest = attend(q, k, v, at <= at[w:, None], dropout_p)
    rest = rearrange(rest, "(b j) h w d -> b h (j w) d", b=b, j=j)
    return torch.cat((first, rest), dim=-2)[..., :n, :]
