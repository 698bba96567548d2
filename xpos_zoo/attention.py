"""Causal multi-head attention with positions from a module of choice: project, rotate, attend, project.

Axes: b batch, n sequence, h heads, g key-value heads, d head dimension.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from xpos_zoo.attend import attend
from xpos_zoo.bias import DistanceBias, QueryScaling
from xpos_zoo.cache import KeyValueCache, LayerCache, weight_of
from xpos_zoo.checks import as_integer, require_integers, require_sizes
from xpos_zoo.context_parallel import block_before, joined
from xpos_zoo.plan import Padding, Pattern, Plan, Tokens, make_plan
from xpos_zoo.rotary import PositionModule
from xpos_zoo.xpos import XPOS

NORM_EPS = torch.finfo(torch.float32).eps  # RMSNorm's default, but in float64 too, so that all dtypes compute the same
EXAMPLES = {"query_scaling": "LogNScaling(0.2, 1024)", "distance_bias": "ScaleInvariant()"}


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm of each head's channels, x (..., head_dim), computed in the weight's dtype and returned in x's dtype."""

    def __init__(self, head_dim: int):
        super().__init__(head_dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class MultiHeadAttention(nn.Module):
    """Causal self-attention on `embed_dim` features with relative positions, dense or blockwise, at any length.

    Args:
        embed_dim: features of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention; 1 is multi-query);
            by default num_heads.
        head_dim: channels of a head; by default embed_dim / num_heads.
        positions: called with head_dim, gives the position module: `XPOS`, `RotaryEmbedding`,
            `partial(XPOS, scale_base=64)`, or any `PositionModule` of your own.
        block_size: None for dense causal attention; an integer for blockwise causal attention in blocks of that size.
        query_scaling: None, or a `QueryScaling` by the number of keys seen: `LogNScaling`, `ScalableSoftmax`.
        distance_bias: None, or a `DistanceBias`: `ScaleInvariant`, `SoftTail`; a module's parameters are trained with
            the others. On CUDA FlexAttention takes it, but for dropout and float64. Elsewhere attention is masked, or
            plain products with a gain, some queries at a time, and training keeps all masks or scores.
        qk_norm: whether queries and keys are normalised before they are rotated, by an RMSNorm over head_dim with
            weights `q_norm` and `k_norm`, as in Qwen3 (Henry et al. 2020, arXiv 2010.04245).
        bias: whether the projections have biases.
        dropout: probability of dropping an attention weight in training.
        device, dtype: where the module goes, and as what, once it is made.

    Attributes that may be set at any time, on a trained model too:
        positions (a module), block_size, query_scaling, distance_bias: as above.
        q_proj, k_proj, v_proj, out_proj: any modules of the same widths, such as quantised ones and adapters.
        cp_mesh: None, or a `DeviceMesh` of one dimension for context parallelism: x is then this rank's part of longer
            rows, which follow each other over its ranks, a multiple of block_size tokens each; so are document_ids.
            Ranks exchange one block of keys and values. For blockwise attention without a cache.

    ValueError if a size is not positive or does not divide as said.
    """

    block_size: int | None
    query_scaling: QueryScaling | None
    distance_bias: DistanceBias | None
    cp_mesh: DeviceMesh | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Callable[[int], PositionModule] = XPOS,
        block_size: int | None = None,
        query_scaling: QueryScaling | None = None,
        distance_bias: DistanceBias | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        head_dim = as_integer("head_dim", head_dim, allowed="even and above 0", even=True)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not isinstance(qk_norm, bool):
            raise ValueError(f"qk_norm must be True or False, got {qk_norm!r}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.dropout = dropout
        self.block_size = block_size
        self.query_scaling = query_scaling
        self.cp_mesh = None
        if isinstance(positions, nn.Module):
            raise ValueError(f"positions must be called with head_dim to give a module, such as XPOS, got {positions}")
        self.positions = positions(head_dim)
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.q_norm = HeadRMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadRMSNorm(head_dim) if qk_norm else nn.Identity()
        self.distance_bias = distance_bias
        self.to(device, dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_size" and value is not None:
            value = as_integer("block_size", value, allowed="above 0 and an integer, or None for dense attention")
        if name == "positions" and (not isinstance(value, PositionModule) or len(value.rates) != self.head_dim // 2):
            raise ValueError(f"positions must give a PositionModule with a rate for each pair, got {value}")
        if name in EXAMPLES and value is not None and (isinstance(value, type) or not callable(value)):
            raise ValueError(f"{name} must be callable, such as {EXAMPLES[name]}, or None, got {value!r}")
        if name == "cp_mesh" and value is not None and not (isinstance(value, DeviceMesh) and value.ndim == 1):
            raise ValueError(f"cp_mesh must be a DeviceMesh of one dimension, or None, got {value!r}")
        if name == "distance_bias" and name in dict(self.named_children()):
            delattr(self, name)  # torch lets nothing but a module take a module's place
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        sizes = "embed_dim", "num_heads", "num_kv_heads", "head_dim", "block_size"
        names = *sizes, "query_scaling", "distance_bias", "qk_norm"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def make_cache(self, batch_size: int, max_length: int | None = None, **options: Any) -> KeyValueCache:
        """An empty cache for `forward`, for the `block_size` of now; arguments as for `KeyValueCache`."""
        return KeyValueCache([self], batch_size, max_length, **options)

    @property
    def pattern(self) -> Pattern:
        preceded = self.cp_mesh is not None and self.cp_mesh.get_local_rank() > 0
        return Pattern(self.positions, self.block_size, self.query_scaling, self.distance_bias, preceded)

    def forward(
        self,
        x: Tensor,
        cache: KeyValueCache | LayerCache | None = None,
        lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        plan: Plan | None = None,
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
                within documents. Blocks are counted from the start of the row.
            key_padding_mask: in place of lengths, with a cache or without: which tokens are padding, anywhere in a row,
                (b, n), bool, True where `nn.MultiheadAttention` has it. Those of a row attend, and are cached, as if
                they stood alone, blocks counted from the first; outputs at padding are 0.
            plan: of a model, which has checked its arguments and holds what they say of the tokens; the cache is then
                this layer's part of the model's, and the model advances it.

        ValueError if an argument has another shape, a dtype that the weights or the cache do not fit, or does not go
        with another, or the cache is full (in a compiled graph a RuntimeError, on CUDA a failed assertion of the
        device, which ends its use).
        """
        if plan is None:
            if cache is not None and not isinstance(cache, KeyValueCache):
                raise ValueError(f"cache must be one of make_cache, got {type(cache).__name__}")
            if x.ndim != 3 or x.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"x must have shape (batch, seq_len, embed_dim={self.embed_dim}), got {tuple(x.shape)}"
                )
            weight = weight_of(self.q_proj)
            dtype = x.dtype if weight is None else weight.dtype
            if x.dtype != dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
                raise ValueError(f"x must have the weights' dtype {dtype}, or run under autocast, got {x.dtype}")
            with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
                (plan,) = plan_layers([self], x, cache, lengths, document_ids, key_padding_mask)
                output = self.forward(x, None if cache is None else cache[0], plan=plan)
                if cache is not None:
                    cache.advance()
            return output
        assert not isinstance(cache, KeyValueCache)
        if plan.padding is not None:
            x = plan.padding.moved(x)
        k = self.k_norm(rearrange(self.k_proj(x), "b n (g d) -> b n g d", d=self.head_dim))
        v = rearrange(self.v_proj(x), "b n (g d) -> b n g d", d=self.head_dim)
        # On its way while queries are projected.
        before = None if self.cp_mesh is None else block_before(self.cp_mesh, self.block_size or 0, k, v)
        q = self.q_norm(rearrange(self.q_proj(x), "b n (h d) -> b n h d", d=self.head_dim))
        if before is not None:
            k, v = joined(before, k, v)
        pattern = self.pattern
        if (key := pattern.plan_key(q.dtype)) != plan.key:
            raise ValueError(f"plan must be made for {key[1:]} and these rates, got one for {plan.key[1:]}")
        if cache is not None and k.dtype != cache.k.dtype:
            raise ValueError(f"cache must hold the block's dtype {k.dtype}, got {cache.k.dtype}")
        attended = attend(q, k, v, plan, pattern, cache, self.dropout if self.training else 0.0)
        output = self.out_proj(rearrange(attended, "b n h d -> b n (h d)"))
        return output if plan.padding is None else plan.padding.returned(output)


def plan_layers(
    layers: list[MultiHeadAttention],
    x: Tensor,
    cache: KeyValueCache | None = None,
    lengths: Tensor | None = None,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[Plan]:
    """A plan for each layer, one for those that attend alike; checks arguments as `MultiHeadAttention.forward` says."""
    b, n, _ = x.shape
    padding = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"key_padding_mask must be bool of shape {(b, n)}, True for padding, got {got}")
        if lengths is not None:
            raise ValueError("lengths must be None with key_padding_mask, which says more")
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        padding = Padding(*(t[..., None] for t in (mask, order, order.argsort(dim=1))))
        lengths = None if cache is None else (~mask).sum(dim=1)
    if ids is not None:
        require_integers("document_ids", ids, x.shape[:2])
        if cache is not None:
            raise ValueError("document_ids must be None with a cache: each row of a cache is one document")
        if any(layer.query_scaling is not None for layer in layers):
            raise ValueError("document_ids must be None with query_scaling, which counts the keys of a whole row")
        ids = ids if padding is None else ids.gather(1, padding.order[..., 0])
    if any(layer.cp_mesh != layers[0].cp_mesh for layer in layers):
        raise ValueError("cp_mesh must be the same in all layers: each gets a part of the tokens from the one before")
    for w in (layer.block_size for layer in layers if layer.cp_mesh is not None):
        if padding is not None:
            raise ValueError("key_padding_mask must be None with cp_mesh: tokens do not move to other ranks")
        if cache is not None:
            raise ValueError("cache must be None with cp_mesh: set that to None to decode")
        if w is None:
            raise ValueError("block_size must be set with cp_mesh, got None: dense layers need the keys of all ranks")
        if n == 0 or n % w:
            raise ValueError(f"seq_len must be a multiple of block_size={w} with cp_mesh, got {n}")
    # The meta device has no autocast. (`is_autocast_available` would break a graph of torch 2.11.)
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if cache is not None:
        if len(cache.layers) != len(layers):
            raise ValueError(f"cache must have {len(layers)} layers, got {len(cache.layers)}")
        for i, layer in enumerate(layers):
            cache[i].check(layer, b)
        tokens = Tokens(b, n, dtype, x.device, cache.length, lengths, cache.admit(n, lengths), padding=padding)
    elif lengths is None:
        tokens = Tokens(b, n, dtype, x.device, document_ids=ids, padding=padding)
    else:
        raise ValueError("lengths must be None without a cache: causal attention never sees right padding")
    plans: dict[Any, Plan] = {}
    patterns = [layer.pattern for layer in layers]
    for i, pattern in enumerate(patterns):
        key = pattern.plan_key(dtype)
        own = None if cache is None else cache[i]
        plans[key] = plans.get(key) or make_plan(pattern, preceded(layers[i], tokens), own)
    return [plans[pattern.plan_key(dtype)] for pattern in patterns]


def preceded(layer: MultiHeadAttention, tokens: Tokens) -> Tokens:
    """The tokens; with a cp_mesh, the document ids of the block before the layer's own are among theirs."""
    ids = tokens.document_ids
    if ids is None or layer.cp_mesh is None:
        return tokens
    return replace(tokens, document_ids=joined(block_before(layer.cp_mesh, layer.block_size or 0, ids), ids)[0])
