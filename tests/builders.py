"""Blocks, models and inputs of the tests, the same at every call.

Axes: b batch, h query heads, g key-value heads, n sequence, d head dimension.
"""

import copy
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xpos_zoo import XPOS, DistanceBias, MultiHeadAttention, PositionModule, Transformer

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)
PATTERNS = pytest.mark.parametrize("block_size", [None, 8], ids=["dense", "blockwise"])


def locality(*sizes: int | None) -> st.SearchStrategy[dict[str, int | None]]:
    """Options of dense attention, if None is one of the sizes, of blocks, and of windows."""
    size = st.sampled_from(sizes)
    return st.builds(dict, block_size=size) | st.builds(dict, window_size=size)


M = TypeVar("M", bound=nn.Module)


def double(module: M) -> M:
    """A float64 copy."""
    return copy.deepcopy(module).double()


def inputs(
    n: int, b: int = 2, h: int = 4, g: int = 2, d: int = 8, dtype: torch.dtype = torch.float32, grad: bool = True
) -> list[Tensor]:
    """Random q (b, h, n, d), k and v (b, g, n, d)."""
    return [normal(i, b, heads, n, d, dtype=dtype).requires_grad_(grad) for i, heads in enumerate((h, g, g))]


def document_ids(n: int) -> Tensor:
    """(2, n): two rows of three documents, cut at different places; the last has the id of the first."""
    return torch.tensor([[int(n // 3 <= i < 2 * n // 3), 2 * int(n // 5 <= i < n // 2)] for i in range(n)]).mT


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Operations(TorchDispatchMode):
    """What is called: names of operators that are not views, the dtypes of what they give, the size of the largest."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not any(name in str(func) for name in ("_unsafe_view", "promote_types")):
            self.names.append(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.dtypes.add(leaf.dtype)
                self.largest = max(self.largest, 0 if func.is_view else leaf.numel())
        return result


class LearnedBias(nn.Module):
    """A bias to learn for each of four heads and each of the first eight distances; the eighth is all others'."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(normal(5, 4, 8))

    def forward(self, distance: Tensor) -> Tensor:
        heads = torch.arange(4, device=distance.device)[:, None, None]
        return self.table[heads, distance.long().clamp(0, 7)]


class Channels(nn.Module):
    """In place of a projection: some of the channels as they are."""

    def __init__(self, start: int, end: int):
        super().__init__()
        self.channels = slice(start, end)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.channels]


def attending(
    q: Tensor, k: Tensor, v: Tensor, positions: PositionModule, bias: DistanceBias | None = None, **options: Any
) -> tuple[MultiHeadAttention, Tensor]:
    """A block without weights, and x (b, n, (h + 2 g) d) from which it takes q (b, h, n, d) and k, v (b, g, n, d)."""
    (_, h, _, d), g = q.shape, k.shape[1]
    embed_dim = (h + 2 * g) * d
    module: Any = MultiHeadAttention(embed_dim, h, num_kv_heads=g, head_dim=d, positions=lambda _: positions, **options)
    module.out_proj = nn.Identity()
    module.set_attention(distance_bias=bias)
    module.q_proj, module.k_proj = Channels(0, h * d), Channels(h * d, (h + g) * d)
    module.v_proj = Channels((h + g) * d, (h + 2 * g) * d)
    return module, torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], dim=-1)


def attended(
    q: Tensor, k: Tensor, v: Tensor, positions: PositionModule, block_size: int | None = None, **options: Any
) -> Tensor:
    """The library's attention of q (b, h, n, d) on k, v (b, g, n, d): (b, h, n, d)."""
    ids = options.pop("document_ids", None)
    module, x = attending(q, k, v, positions, block_size=block_size, **options)
    return module(x, document_ids=ids).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)


def block(embed_dim: int = 32, num_heads: int = 4, **options: Any) -> MultiHeadAttention:
    """The same weights at every call; those of norms are no ones."""
    torch.manual_seed(0)
    return with_random_norms(MultiHeadAttention(embed_dim, num_heads, **options))


def with_random_norms(module: M) -> M:
    for i, norm in enumerate(each for each in module.modules() if isinstance(each, nn.RMSNorm)):
        norm.weight.data = 1 + 0.3 * normal(30 + i, *norm.weight.shape, dtype=norm.weight.dtype)
    return module


def model(
    num_layers: int = 2, vocab_size: int = 50, embed_dim: int = 32, num_heads: int = 4, **options: Any
) -> Transformer:
    """The same weights at every call."""
    torch.manual_seed(0)
    options.setdefault("positions", partial(XPOS, scale_base=8))
    return Transformer(vocab_size, embed_dim, num_layers, num_heads, **options)


def far_apart(model: Transformer) -> Transformer:
    """With weights so large that logits are far apart and every token counts."""
    for parameter in model.parameters():
        parameter.data *= 6
    return model.eval().requires_grad_(False)


def tokens(*shape: int, below: int = 50) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0))
