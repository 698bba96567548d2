"""Causal multi-head attention with a choice of position encodings: project, attend, project.

Axes: b batch, n sequence, h heads, g key-value heads, d head dimension.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from xpos_zoo.bias import DistanceBias, QueryScaling
from xpos_zoo.blockwise import fetch_previous, prepend
from xpos_zoo.cache import KeyValueCache, weight_of
from xpos_zoo.checks import as_integer, as_number, as_sizes
from xpos_zoo.plan import LayerPlan, plan_attention
from xpos_zoo.rotary import XPOS, PositionModule
from xpos_zoo.settings import AttentionSettings
from xpos_zoo.visibility import AttentionPattern

NORM_EPS = torch.finfo(torch.float32).eps  # RMSNorm's default, but in float64 too, so that all dtypes compute the same


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm of each head's channels, x (..., head_dim), computed in the weight's dtype and returned in x's dtype."""

    def __init__(self, head_dim: int):
        super().__init__(head_dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def setting(name: str) -> Any:
    """A property of an attention that is checked when it is set."""
    return property(
        lambda attention: getattr(attention, f"_{name}"),
        lambda attention, value: attention.set_attention(**{name: value}),
    )


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
        block_size: None for dense causal attention; an integer for blockwise causal attention in blocks of that size: a
            query sees its own block and the one before.
        window_size: None; or an integer, in place of block_size, for a sliding window: a query sees so many tokens, its
            own included.
        query_scaling: None, or a `QueryScaling` by the number of keys seen: `LogNScaling`, `ScalableSoftmax`.
        distance_bias: None, or a `DistanceBias`: `ScaleInvariant`, `SoftTail`, `ALiBi`; a module's parameters are
            trained with the others. On CUDA it is left to FlexAttention, unless there is dropout or float64. Elsewhere
            attention takes a mask, or plain products with a gain, for some queries at a time, and training keeps all
            masks or scores.
        qk_norm: whether queries and keys are normalised before they are rotated, by an RMSNorm over head_dim with
            weights `q_norm` and `k_norm`, as in Qwen3 (Henry et al. 2020, arXiv 2010.04245).
        output_gate: whether the output is multiplied by the sigmoid of one more projection of x, `gate_proj`, before
            `out_proj` (Qiu et al. 2025, arXiv 2505.06708).
        bias: whether the projections have biases.
        dropout: probability of dropping an attention weight in training.
        device, dtype: where the module goes, and as what, once it is made.

    Attributes that may be set at any time, on a trained model too:
        block_size, window_size, query_scaling, distance_bias, dropout, positions (a module): as above. To replace a
            bias that is a module by one that is none, or a block by a window, use `set_attention`.
        q_proj, k_proj, v_proj, out_proj: any modules of the same widths, such as quantised ones and adapters.
        num_kv_heads: of this device, for its caches, where heads are split over several (tensor parallelism).
        cp_mesh: None, or a `DeviceMesh` of one dimension for context parallelism without a cache: x is then this rank's
            part of longer rows, which follow each other over its ranks; so are document_ids. Parts are equally long, a
            multiple of block_size, or at least window_size tokens. Ranks exchange one block or window of keys and
            values; dense attention gathers those of all ranks.

    ValueError if a size is not positive or does not divide as said.
    """

    positions: PositionModule
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
        window_size: int | None = None,
        query_scaling: QueryScaling | None = None,
        distance_bias: DistanceBias | None = None,
        qk_norm: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        embed_dim, num_heads, num_kv_heads = as_sizes(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        )
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be divisible by num_heads={num_heads}, got {embed_dim}; or give head_dim"
                )
            head_dim = embed_dim // num_heads
        head_dim = as_integer("head_dim", head_dim, allowed="even and above 0", even=True)
        for name, value in {"qk_norm": qk_norm, "output_gate": output_gate}.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if isinstance(positions, nn.Module):
            raise ValueError(f"positions must be called with head_dim to give a module, such as XPOS, got {positions}")
        self._sizes = embed_dim, num_heads, head_dim
        self.num_kv_heads = num_kv_heads
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.gate_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias) if output_gate else None
        self.q_norm = HeadRMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadRMSNorm(head_dim) if qk_norm else nn.Identity()
        self.set_attention(
            positions=positions(head_dim),
            block_size=block_size,
            window_size=window_size,
            query_scaling=query_scaling,
            distance_bias=distance_bias,
            dropout=dropout,
            cp_mesh=None,
        )
        self.to(device, dtype)

    def set_attention(self, **settings: Any) -> None:
        """Set any of positions (a module), block_size, window_size, query_scaling, distance_bias, dropout and cp_mesh.

        ValueError, and nothing is set, if one is unknown or cannot be what it is given as.
        """
        checked = self.check_attention(**settings)
        for name, value in checked.items():
            stored = name if name in ("positions", "distance_bias") else f"_{name}"
            if stored in self._modules and not isinstance(value, nn.Module):
                delattr(self, stored)  # torch lets nothing but a module take a module's place
            setattr(self, stored, value)

    def check_attention(self, **settings: Any) -> dict[str, Any]:
        """The values that `set_attention` would set; its ValueErrors."""
        checked = {name: self._checked(name, value) for name, value in settings.items()}
        sizes = {name: checked.get(name, getattr(self, f"_{name}", None)) for name in ("block_size", "window_size")}
        if None not in sizes.values():
            raise ValueError(f"block_size or window_size must be None, got {' and '.join(map(str, sizes.values()))}")
        return checked

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would register a module under the name of a property, which would stay as it was.
        if isinstance(value, nn.Module) and isinstance(getattr(type(self), name, None), property):
            self.set_attention(**{name: value})
        else:
            super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        match name:
            case "block_size" | "window_size":
                allowed = "above 0 and an integer, or None for dense attention"
                return None if value is None else as_integer(name, value, allowed=allowed)
            case "positions":
                if not isinstance(value, PositionModule) or len(value.rates) != self.head_dim // 2:
                    raise ValueError(f"positions must give a PositionModule with a rate for each pair, got {value}")
            case "query_scaling" | "distance_bias":
                example = "LogNScaling(0.2, 1024)" if name == "query_scaling" else "ScaleInvariant()"
                if value is not None and (isinstance(value, type) or not callable(value)):
                    raise ValueError(f"{name} must be callable, such as {example}, or None, got {value!r}")
            case "dropout":
                value = float(as_number(name, value, positive=False))
                if value >= 1:
                    raise ValueError(f"dropout must be in [0, 1), got {value}")
            case "cp_mesh":
                if value is not None and not (isinstance(value, DeviceMesh) and value.ndim == 1):
                    raise ValueError(f"cp_mesh must be a DeviceMesh of one dimension, or None, got {value!r}")
            case _:
                known = "positions, block_size, window_size, query_scaling, distance_bias, dropout or cp_mesh"
                raise ValueError(f"an attention's setting must be {known}, got {name!r}")
        return value

    embed_dim = property(lambda self: self._sizes[0])
    num_heads = property(lambda self: self._sizes[1])
    head_dim = property(lambda self: self._sizes[2])
    qk_norm = property(lambda self: isinstance(self.q_norm, HeadRMSNorm))
    output_gate = property(lambda self: self.gate_proj is not None)
    block_size = setting("block_size")
    window_size = setting("window_size")
    query_scaling = setting("query_scaling")
    dropout = setting("dropout")
    cp_mesh = setting("cp_mesh")

    @property
    def settings(self) -> AttentionSettings:
        """How the block attends now; ValueError if positions or distance_bias were set to something else."""
        return AttentionSettings(
            self._checked("positions", self.positions),
            AttentionPattern(self.block_size, self.window_size),
            self.query_scaling,
            self._checked("distance_bias", self.distance_bias),
            self.dropout if self.training else 0.0,
            0 if self.cp_mesh is None else self.cp_mesh.get_local_rank(),
        )

    def extra_repr(self) -> str:
        sizes = "embed_dim", "num_heads", "num_kv_heads", "head_dim", "block_size", "window_size"
        names = *sizes, "query_scaling", "distance_bias", "qk_norm", "output_gate"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def make_cache(self, batch_size: int, max_length: int | None = None, **options: Any) -> KeyValueCache:
        """An empty cache for `forward`, for the present settings; arguments as for `KeyValueCache`."""
        return KeyValueCache([self], batch_size, max_length, **options)

    def forward(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        *,
        lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend causally within x (b, n, embed_dim); gives the same shape.

        Args:
            x: the sequence, or, with a cache, what comes next in it: one token or many.
            cache: from `make_cache`; x is appended to it and attends to everything before. The outputs are those of one
                forward over everything. A cache is for inference: the output has no gradient.
            lengths: with a cache, how many of each row's n tokens count, (b,), integers; the rest is padding on the
                right, which is not cached. Each row continues from its own end and gives the same outputs as on its
                own. (Without a cache, causal attention never sees padding on the right.)
            document_ids: without a cache, which document each token belongs to, (b, n), integers: attention stays
                within documents. Blocks are counted from the start of the row.
            key_padding_mask: in place of lengths, with a cache or without: which tokens are padding, anywhere in a row,
                (b, n), bool, True for padding as in `nn.MultiheadAttention`. A row's other tokens attend, and are
                cached, as if they stood alone, blocks counted from the first; outputs at padding are 0.

        ValueError if an argument has another shape, a dtype that the weights or the cache do not fit, or cannot be
        combined with another, or the cache is full (in a compiled graph a RuntimeError, on CUDA a failed assertion of
        the device, which ends its use).
        """
        weight = weight_of(self.q_proj)
        dtype = x.dtype if weight is None else weight.dtype
        if x.dtype != dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x must have the weights' dtype {dtype}, or run under autocast, got {x.dtype}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            (plan,) = plan_attention(
                [self], x, cache, lengths=lengths, document_ids=document_ids, key_padding_mask=key_padding_mask
            )
            output = self.attend(x, plan)
            if cache is not None:
                cache.advance()
        return output

    def attend(self, x: Tensor, plan: LayerPlan) -> Tensor:
        """`forward` by a plan of `plan_attention`, which has checked all arguments. The cache is not advanced."""
        if plan.padding is not None:
            x = plan.padding.unpad(x)
        k = self.k_norm(rearrange(self.k_proj(x), "b n (g d) -> b n g d", d=self.head_dim))
        v = rearrange(self.v_proj(x), "b n (g d) -> b n g d", d=self.head_dim)
        # Sent before queries are projected, and waited for after.
        settings = self.settings
        previous = None if self.cp_mesh is None else fetch_previous(self.cp_mesh, settings.pattern.row_length, k, v)
        q = self.q_norm(rearrange(self.q_proj(x), "b n (h d) -> b n h d", d=self.head_dim))
        if previous is not None:
            k, v = prepend(previous, k, v)
        if (key := settings.plan_key(q.dtype)) != plan.key:
            raise ValueError(
                f"plan does not match this block: needs {key[1:]} and its rates, was made for {plan.key[1:]}"
            )
        if plan.cache is not None and k.dtype != plan.cache.k.dtype:
            raise ValueError(f"cache must hold the block's dtype {k.dtype}, got {plan.cache.k.dtype}")
        attended = rearrange(plan.case.attend(q, k, v, settings, plan.cache), "b n h d -> b n (h d)")
        if self.gate_proj is not None:
            attended = attended * self.gate_proj(x).sigmoid()
        output = self.out_proj(attended)
        return output if plan.padding is None else plan.padding.pad(output)
