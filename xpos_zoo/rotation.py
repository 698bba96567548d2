"""Rotation of channel pairs: `rotate_pairs`, and `Rotation` for compiled code, which moves a pair as one integer.

Axes: d head dimension, i = d/2 channel pairs, each read as one complex number.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of `dtype` are rotated: never half precision."""
    return torch.promote_types(dtype, torch.float32)


def rotate_pairs(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    factor: Tensor | None = None,
    interleaved: bool = True,
    backwards: bool = False,
    packed: bool = False,
) -> Tensor:
    """Multiply the channel pairs of x (..., d) by `factor * (cos + 1j * sin)`, tables (..., i); keeps x's dtype.

    `backwards` rotates by the opposite angle; `packed` moves interleaved pairs whole, which autograd cannot follow.
    Computed in the dtype of the tables, if that is wider, and rounded to x's dtype once. The rounding comes before the
    pairs are joined, so that the compiler makes one kernel of it.
    """
    layout, axis = ("i two", -1) if interleaved else ("two i", -2)
    a, b = unpack(x) if packed else rearrange(x, f"... ({layout}) -> ... {layout}", two=2).unbind(axis)
    if factor is None:
        a, b = (t.to(torch.promote_types(t.dtype, cos.dtype)) for t in (a, b))  # so that gradients are rounded once
    else:
        a, b = a * factor, b * factor
    a, b = (a * cos + b * sin, b * cos - a * sin) if backwards else (a * cos - b * sin, b * cos + a * sin)
    if packed:
        return pack(a, b, x.dtype)
    return rearrange(torch.stack((a.to(x.dtype), b.to(x.dtype)), axis), f"... {layout} -> ... ({layout})")


def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both channels of the interleaved pairs of x (..., d), float32 or bfloat16, each (..., i) in float32.

    A pair is loaded as one integer of twice the width: compilers do not vectorise loads of every other number.
    """
    pairs = x.contiguous().view(torch.int64 if x.dtype == torch.float32 else torch.int32)
    if x.dtype == torch.float32:
        return pairs.to(torch.int32).view(torch.float32), (pairs >> 32).to(torch.int32).view(torch.float32)
    return (pairs << 16).view(torch.float32), (pairs & -0x10000).view(torch.float32)  # bfloat16 is float32's upper half


def pack(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `unpack`, rounding to nearest even; NaN stays NaN."""
    low, high = a.view(torch.int32), b.view(torch.int32)
    if dtype == torch.float32:
        return ((low.to(torch.int64) & 0xFFFFFFFF) | (high.to(torch.int64) << 32)).view(dtype)
    low, high = (
        torch.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000) for x, bits in ((a, low), (b, high))
    )
    return (((low >> 16) & 0xFFFF) | (high & -0x10000)).view(dtype)


class Rotation(torch.autograd.Function):
    """`rotate_pairs` for compiled code: the gradient is the rotation by the opposite angle, so pairs may be packed.

    The compiler makes one kernel of that, and several of what autograd derives. Without packing, a compiled block with
    interleaved bfloat16 pairs takes 1.1 times as long (512 features, 1,024 and 4,096 tokens, 2 CPU cores), and the
    rotation alone 3 times, in float32 1.3.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, interleaved: bool, backwards: bool
    ) -> Tensor:
        packed = interleaved and x.dtype in (torch.bfloat16, torch.float32)
        return rotate_pairs(x, cos, sin, factor, interleaved, backwards, packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tables, ctx.interleaved, ctx.backwards = inputs
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x = Rotation.apply(gradient.contiguous(), *ctx.saved_tensors, ctx.interleaved, not ctx.backwards)
        return x, None, None, None, None, None
