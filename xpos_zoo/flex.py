"""FlexAttention: what CUDA attends with where logits have a gain or bias by distance.

Axes: b batch, n queries, m keys, h heads, g key-value heads, d head dimension.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from xpos_zoo.settings import AttentionSettings
from xpos_zoo.visibility import DistanceTable, Visibility


def use_flex(settings: AttentionSettings, n: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether n queries attend by FlexAttention: one kernel on CUDA, where a mask would be n x m.

    It takes no float64, no dropout, and head dimensions from 16 on.
    """
    fits = dtype != torch.float64 and len(settings.positions.rates) >= 8 and settings.dropout_p == 0
    return settings.distance_bias is not None and n > 1 and device.type == "cuda" and fits


def flex_attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, table: DistanceTable, start: int) -> Tensor:
    """Attention of q (b, h, n, d), the queries from `start` on of those of `visibility`, on its first m keys k, v
    (b, g, m, d): (b, h, n, d)."""
    rows = slice(start, start + q.shape[2])
    q_positions, zero = visibility.q_positions[:, rows], table.bias.shape[-1] // 2 - 1
    q_documents = None if visibility.q_documents is None else visibility.q_documents[:, rows]
    k_documents, bias, gain = visibility.k_documents, table.bias, table.gain

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query = q_positions[b % len(q_positions), i]
        column = (zero - query + j).clamp(min=0)  # padding may stand behind the last key
        score = score if gain is None else score * gain[h % len(gain), column]
        visible = visibility.is_visible(query, j)
        if q_documents is not None and k_documents is not None:
            visible = visible & (q_documents[b, i] == k_documents[b, j])
        return torch.where(visible, score + bias[h % len(bias), column], -torch.inf)

    eager = not torch.compiler.is_compiling() and q.device.type == "cuda"
    with torch.autocast(q.device.type, enabled=False):
        attend = compiled_flex() if eager else flex.flex_attention
        return attend(q, k, v, score_mod, enable_gqa=k.shape[1] != q.shape[1])


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention)
