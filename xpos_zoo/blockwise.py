"""Blockwise causal attention (BCA; Sun et al. 2022, section 3.2): linear in length, every position block-local.

The sequence is cut into blocks of w tokens. A query sees its own block causally and all of the block before it.

Axes: b batch, h heads (those of q, or the fewer of k and v), j blocks, w tokens in a block, n = j w, d head dimension.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from xpos_zoo.dense import PositionModule, attend_windows, dense_attention, same_document


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: PositionModule,
    block_size: int,
    dropout_p: float = 0.0,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Blockwise causal attention of q (b, h, n, d), not yet rotated, on k, v (b, g, n, d); gives (b, h, n, d).

    Only within documents if document_ids (b, n) tells them apart; blocks are counted from the start of the row.
    """
    n, w = q.shape[-2], block_size
    if n <= 2 * w:  # every query sees all keys before it
        return dense_attention(q, k, v, positions, dropout_p, document_ids)

    # j blocks after the first. A graph for any length pads by a block where it need not: else it would be two graphs.
    b, j = q.shape[0], n // w - known(n % w == 0)
    padding = (j + 1) * w - n
    q, k, v = (pad(t, (0, 0, 0, padding)) for t in (q, k, v))
    first_ids = visible = None
    if document_ids is not None:
        ids = pad(document_ids, (0, padding))
        first_ids = ids[:, :w]
        visible = same_document(fold(ids[:, w:, None], w)[..., 0], windows(ids[..., None], w)[..., 0])
    first = dense_attention(q[..., :w, :], k[..., :w, :], v[..., :w, :], positions, dropout_p, first_ids)
    rest = attend_blocks(fold(q[..., w:, :], w), windows(k, w), windows(v, w), positions, visible, dropout_p)
    rest = rearrange(rest, "(b j) h w d -> b h (j w) d", b=b, j=j)
    return torch.cat((first, rest), dim=-2)[..., :n, :]


def known(condition: bool) -> bool:
    """Whether the condition holds; in a graph for any length, whether it holds for all."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a third of a second, for a compiler only

    return statically_known_true(condition)


def fold(t: Tensor, w: int) -> Tensor:
    """(b, ..., n, d) to (b j, ..., w, d): each block a batch row of its own."""
    return rearrange(t, "b ... (j w) d -> (b j) ... w d", w=w)


def windows(t: Tensor, w: int) -> Tensor:
    """Of each block but the first, it and the block before it: (b, ..., n, d) to (b (j-1), ..., 2 w, d)."""
    return torch.cat((fold(t[..., :-w, :], w), fold(t[..., w:, :], w)), dim=-2)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: PositionModule,
    visible: Tensor | None = None,
    dropout_p: float = 0.0,
    part_size: int = 1,
) -> Tensor:
    """Attention of blocks q (b, h, w, d) on their windows k, v (b, g, 2 w, d), whose second half are the blocks.

    Args:
        visible: where queries may look besides causality, broadcasting to (b, 1, w, 2 w).
        part_size: k is rotated already relative to the starts of parts of that size; 1 is not at all.
    """
    w = q.shape[-2]
    at = torch.arange(-w, w, device=q.device)

    def window(rows: slice) -> tuple[slice, Tensor]:
        keys = slice(0, w + rows.stop)
        mask = at[keys] <= at[w:][rows, None]
        return keys, mask if visible is None else mask & visible[..., rows, keys]

    return attend_windows(q, k, v, positions, at[w:], at, window, dropout_p, k_turned=at % part_size)
