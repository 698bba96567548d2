"""Causal multi-head attention with positions from a module of choice: project, rotate, attend, project.

Axes: b batch, n sequence, h heads, g key-value heads, d head dimension.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from xpos_zoo.bias import DistanceBias
from xpos_zoo.blockwise import blockwise_attention
from xpos_zoo.cache import KeyValueCache, cached_attention
from xpos_zoo.checks import is_size, require_integers, require_sizes
from xpos_zoo.dense import PositionModule, dense_attention, distance_bias_of
from xpos_zoo.rotary import at_least_float32
from xpos_zoo.xpos import XPOS


@dataclass(frozen=True)
class Temperature:
    """Sharpen queries that see more keys than in training, at evaluation time and without any training.

    A query that sees n keys is multiplied by 1 + coefficient * ln(n / trained_length) if n is above trained_length, so
    that the sheer number of far keys does not drown the near ones (log-n scaling; Llama 4 uses 0.1).

    Raises:
        ValueError: coefficient is negative or infinite, or trained_length is not positive.
    """

    coefficient: float
    trained_length: int

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(f"coefficient must be 0 or above and finite, got {self.coefficient}")
        if not self.trained_length > 0:
            raise ValueError(f"trained_length must be above 0, got {self.trained_length}")

    def __call__(self, q: Tensor, visible_keys: Tensor) -> Tensor:
        """q (..., n, d) with row j sharpened for visible_keys[..., j] keys; q's dtype."""
        dtype = at_least_float32(q.dtype)
        factor = sharpening(visible_keys, float(self.coefficient), float(self.trained_length), dtype)
        return (q * factor[..., None]).to(q.dtype)


@torch.library.custom_op("xpos_zoo::sharpening", mutates_args=())
def sharpening(visible_keys: Tensor, coefficient: float, trained_length: float, dtype: torch.dtype) -> Tensor:
    """1 + coefficient * ln(visible_keys / trained_length), at least 1, evaluated in float64.

    An operator of its own for the same reason as `rotary_table`.
    """
    excess = torch.log(visible_keys.double() / trained_length).clamp(min=0)
    return (1 + coefficient * excess).to(dtype)


@sharpening.register_fake
def _(visible_keys: Tensor, coefficient: float, trained_length: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(visible_keys, dtype=dtype)


class Biased:
    """A position module with one more bias by distance."""

    def __init__(self, positions: PositionModule, bias: DistanceBias):
        self.positions = positions
        self.bias = bias

    def rotate(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.positions.rotate(*args, **kwargs)

    def max_span(self, dtype: torch.dtype) -> int:
        return self.positions.max_span(dtype)

    def distance_bias(self, distance: Tensor) -> Tensor:
        own = distance_bias_of(self.positions)
        return self.bias(distance) if own is None else self.bias(distance) + own(distance)


class MultiHeadAttention(nn.Module):
    """Causal self-attention on `embed_dim` features with relative positions, dense or blockwise, at any length.

    Args:
        embed_dim: features of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention; 1 is multi-query);
            by default num_heads.
        head_dim: channels of a head; by default embed_dim / num_heads.
        positions: called with head_dim, gives the position module: `XPOS`, `RotaryEmbedding`,
            `partial(XPOS, scale_base=64)`, or your own with their `rotate` and `max_span`, and if you like with a
            `distance_bias`: see `PositionModule`.
        block_size: None for dense causal attention; an integer for blockwise causal attention in blocks of that size.
        bias: whether the projections have biases.
        dropout: probability of dropping an attention weight in training.

    Attributes that may be set at any time, on a trained model too:
        block_size: as above.
        temperature: None, or a `Temperature` for queries that see more keys than in training.
        distance_bias: None, or a `DistanceBias` such as `SoftTail` for keys farther away than any in training. A module
            with parameters is a submodule, and trained with the others.

    With a bias, attention is masked instead of causal, 1024 queries at a time; training keeps all masks.

    Raises:
        ValueError: for a size that is not positive or does not divide as said.
    """

    distance_bias: DistanceBias | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Callable[[int], PositionModule] = XPOS,
        block_size: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_sizes(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be divisible by num_heads={num_heads}, got {embed_dim}; or give head_dim"
                )
            head_dim = embed_dim // num_heads
        require_sizes(head_dim=head_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dropout = dropout
        self.block_size = block_size
        self.temperature = None
        self.distance_bias = None
        if isinstance(positions, nn.Module):
            raise ValueError(f"positions must be called with head_dim to give a module, such as XPOS, got {positions}")
        self.positions = positions(head_dim)
        if not (hasattr(self.positions, "rotate") and hasattr(self.positions, "max_span")):
            raise ValueError(f"positions must give a module with rotate and max_span, got {self.positions}")
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)

    @property
    def block_size(self) -> int | None:
        return self._block_size

    @block_size.setter
    def block_size(self, value: int | None) -> None:
        if value is not None and not is_size(value):
            raise ValueError(f"block_size must be above 0 and an integer, or None for dense attention, got {value!r}")
        self._block_size = value

    @property
    def temperature(self) -> Temperature | None:
        return self._temperature

    @temperature.setter
    def temperature(self, value: Temperature | None) -> None:
        if value is not None and not isinstance(value, Temperature):
            raise ValueError(f"temperature must be a Temperature or None, got {value!r}")
        self._temperature = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "distance_bias":
            if value is not None and not callable(value):
                raise ValueError(f"distance_bias must be callable, such as a SoftTail, or None, got {value!r}")
            self._modules.pop(name, None)  # torch lets nothing but a module take a module's place
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, block_size={self.block_size}, temperature={self.temperature}, "
            f"distance_bias={self.distance_bias}"
        )

    def make_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> KeyValueCache:
        """An empty cache for `forward`, of the attention pattern that `block_size` asks for now.

        Args:
            batch_size: rows.
            max_length: tokens a row that dense attention has room for. Blockwise attention needs none: it keeps two
                blocks, for ever.
            dtype, device: by default those of the weights; under autocast its dtype.

        Raises:
            ValueError: a size is not positive, or max_length is missing for dense attention.
        """
        device = self.k_proj.weight.device if device is None else device
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.k_proj.weight.dtype
        return KeyValueCache(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.positions,
            max_length=max_length,
            block_size=self.block_size,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend causally within x (b, n, embed_dim); gives the same shape.

        Args:
            x: the sequence, or, with a cache, what comes next in it: one token or many.
            cache: of `make_cache`; x is appended to it and attends to all that came before. The outputs are those of
                one forward over everything. A cache is for inference: the output has no gradient.
            lengths: with a cache, how many of each row's n tokens count, (b,), integers; the rest is padding on the
                right, which is not cached. Rows go on from their own ends, each as it would alone. (Without a cache,
                causal attention never looks at padding on the right.)
            document_ids: without a cache, which document each token belongs to, (b, n), integers: attention stays
                within documents. Only differences of positions count, so they need not restart. The blocks of blockwise
                attention are counted from the start of the row.

        Raises:
            ValueError: an argument has another shape, a dtype that the weights or the cache do not fit, or does not go
                with another; the cache is full (in a compiled graph a RuntimeError, on CUDA a failed assertion of the
                device, which ends its use).
        """
        self._check(x, cache, lengths, document_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._attend(x, cache, lengths, document_ids)

    def _attend(
        self, x: Tensor, cache: KeyValueCache | None, lengths: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        b, n, _ = x.shape
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", d=self.head_dim)
        k = rearrange(self.k_proj(x), "b n (g d) -> b g n d", d=self.head_dim)
        v = rearrange(self.v_proj(x), "b n (g d) -> b g n d", d=self.head_dim)
        if self.temperature is not None:
            at = torch.arange(n, device=x.device)
            if cache is not None:
                at = cache.length[:, None, None] + at
            q = self.temperature(q, visible_keys(at, self.block_size))
        positions = self.positions if self.distance_bias is None else Biased(self.positions, self.distance_bias)
        dropout_p = self.dropout if self.training else 0.0
        if cache is not None:
            if k.dtype != cache.k.dtype:
                raise ValueError(f"cache must hold the block's dtype {k.dtype}, got {cache.k.dtype}")
            count = torch.full((b,), n, device=x.device) if lengths is None else lengths
            attended = cached_attention(q, k, v, positions, cache, count)
        elif self.block_size is None:
            attended = dense_attention(q, k, v, positions, dropout_p, document_ids)
        else:
            attended = blockwise_attention(q, k, v, positions, self.block_size, dropout_p, document_ids)
        return self.out_proj(rearrange(attended, "b h n d -> b n (h d)"))

    def _check(
        self, x: Tensor, cache: KeyValueCache | None, lengths: Tensor | None, document_ids: Tensor | None
    ) -> None:
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must have shape (batch, seq_len, embed_dim={self.embed_dim}), got {tuple(x.shape)}")
        weight = self.q_proj.weight
        if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x must have the weights' dtype {weight.dtype}, or run under autocast, got {x.dtype}")
        if document_ids is not None:
            require_integers("document_ids", document_ids, x.shape[:2])
            if cache is not None:
                raise ValueError("document_ids must be None with a cache: each row of a cache is one document")
            if self.temperature is not None:
                raise ValueError("document_ids must be None with a temperature, which counts the keys of a whole row")
        if cache is None:
            if lengths is not None:
                raise ValueError("lengths must be None without a cache: causal attention never sees right padding")
            return
        if cache.block_size != self.block_size:
            raise ValueError(f"cache must be made for block_size={self.block_size}, got one for {cache.block_size}")
        kept = cache.k.shape
        if (kept[0], kept[1], kept[3]) != (x.shape[0], self.num_kv_heads, self.head_dim):
            raise ValueError(
                f"cache must have batch size {x.shape[0]}, {self.num_kv_heads} heads and head_dim {self.head_dim}, "
                f"got {kept[0]}, {kept[1]} and {kept[3]}"
            )
        if lengths is not None:
            require_integers("lengths", lengths, x.shape[:1])
        cache.check_room(x.shape[1], lengths)


def visible_keys(positions: Tensor, block_size: int | None) -> Tensor:
    """How many keys the query at each position sees, its own included: dense if block_size is None, else blockwise."""
    if block_size is None:
        return positions + 1
    return positions + 1 - (positions // block_size - 1).clamp(min=0) * block_size
