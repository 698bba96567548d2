"""Rotary position embedding: the documented functions, and the module that attention uses.

Axes: n sequence, d head dimension, i = d/2 pairs of channels. A pair is one complex number; rotating it by position p
multiplies it by exp(1j * p * theta_i) with theta_i = base^(-2i/d) (Su et al. 2021, RoFormer, eq. 34).
"""

import sys
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from xpos_zoo.checks import is_size


@torch.library.custom_op("xpos_zoo::rotary_table", mutates_args=())
def rotary_table(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """cos and sin of `positions * theta`, evaluated in float64: (2, *positions.shape, head_dim / 2).

    An operator of its own because the compiler must not look inside: it would recompute sine and cosine for every
    batch row and head instead of once a position, and may round `base` to float32.
    """
    table = positions.new_empty((2, *positions.shape, head_dim // 2), dtype=dtype)
    write_rotations(positions, head_dim, base, table)
    return table


@rotary_table.register_fake
def _(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    return positions.new_empty((2, *positions.shape, head_dim // 2), dtype=dtype)


def write_rotations(positions: Tensor, head_dim: int, base: float, table: Tensor) -> None:
    """cos and sin of `positions * theta` into table[0] and table[1]."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None] * base ** (-pair / head_dim)
    torch.cos(angle, out=table[0])
    torch.sin(angle, out=table[1])


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tables and rotation use for inputs of `dtype`: never half precision."""
    return torch.promote_types(dtype, torch.float32)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True, back: bool = False) -> Tensor:
    """Multiply x's channel pairs, as complex numbers, by `cos + 1j * sin`: x (..., n, d), tables (..., n, d/2).

    `back` multiplies by the conjugate. Computes in the wider of both dtypes and returns x's. Rounding to x's dtype
    comes before the pairs are joined: so the compiler makes one kernel of it.
    """
    apart, axis = ("i two", -1) if interleaved else ("two i", -2)
    real, imaginary = rearrange(x, f"... ({apart}) -> ... {apart}", two=2).unbind(axis)
    if back:
        rotated = real * cos + imaginary * sin, imaginary * cos - real * sin
    else:
        rotated = real * cos - imaginary * sin, imaginary * cos + real * sin
    return rearrange(torch.stack([part.to(x.dtype) for part in rotated], axis), f"... {apart} -> ... ({apart})")


class Rotation(torch.autograd.Function):
    """Rotate x by a `rotary_table`, and multiply it by factor unless that is None.

    The gradient is the same rotated back; left to itself, autograd takes the pairs apart and joins them again step by
    step. Table and factor, which come from positions, get none.
    """

    @staticmethod
    def forward(x: Tensor, table: Tensor, factor: Tensor | None, interleaved: bool, back: bool) -> Tensor:
        cos, sin = table
        if factor is not None:
            cos, sin = cos * factor, sin * factor
        return rotate_pairs(x, cos, sin, interleaved, back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, table, factor, ctx.interleaved, ctx.back = inputs
        ctx.save_for_backward(table, factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return Rotation.apply(gradient, *ctx.saved_tensors, ctx.interleaved, not ctx.back), None, None, None, None


def fixed_pos_embedding(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine tables for x's shape (seq_len, dim): `(sin, cos)`, each (seq_len, dim), in x's dtype.

    Row n, column j holds the angle n * 10000^(-j/dim). Only x's shape, device and dtype count.

    Raises:
        ValueError: x is not two-dimensional.
    """
    if x.ndim != 2:
        raise ValueError(f"x must have shape (seq_len, dim), got {tuple(x.shape)}")
    seq_len, dim = x.shape
    dtype = x.dtype if x.is_floating_point() else torch.float32
    # Frequencies 10000^(-j/dim) for dim columns are those of a head of 2 * dim channels.
    cos, sin = rotary_table(torch.arange(seq_len, device=x.device), 2 * dim, 10000.0, dtype)
    return sin, cos


def rotate_every_two(x: Tensor) -> Tensor:
    """Turn each channel pair (a, b) of x (..., seq_len, dim) into (-b, a).

    Raises:
        ValueError: dim is odd.
    """
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, got shape {tuple(x.shape)}")
    a, b = rearrange(x, "... (i two) -> ... i two", two=2).unbind(-1)
    return rearrange(torch.stack((-b, a), -1), "... i two -> ... (i two)")


def duplicate_interleave(m: Tensor) -> Tensor:
    """Repeat each column of m twice, side by side: (..., d) becomes (..., 2d).

    Raises:
        ValueError: m has no dimension.
    """
    if m.ndim < 1:
        raise ValueError("m must have at least one dimension, got a scalar")
    return repeat(m, "... d -> ... (d two)", two=2)


def apply_rotary_pos_emb(x: Tensor, sin: Tensor, cos: Tensor, scale: float | Tensor = 1) -> Tensor:
    """Rotate the interleaved pairs of x (..., seq_len, dim) by the tables and multiply by `scale`; x's shape and dtype.

    Args:
        x: (batch, seq_len, dim), or with any leading dimensions.
        sin, cos: (seq_len, dim/2), one column a pair; or (seq_len, dim) as `fixed_pos_embedding` gives for x's own
            width, of which column 2i is pair i's frequency. Leading dimensions broadcast against x's.
        scale: a number, or a tensor of either table width.

    Raises:
        ValueError: x is no floating-point tensor, dim is odd or zero, or a table's shape does not fit x.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., seq_len, dim) with an even dim above 0, got {tuple(x.shape)}")

    def per_pair(name: str, table: Tensor) -> Tensor:
        seq_len, dim = x.shape[-2:]
        if table.ndim < 1 or table.shape[-1] not in (dim // 2, dim):
            raise ValueError(f"{name} must be {dim // 2} or {dim} wide for x of width {dim}, got {tuple(table.shape)}")
        if table.ndim > 1 and table.shape[-2] not in (1, seq_len):
            raise ValueError(f"{name} must have {seq_len} rows, one for each of x's, got {tuple(table.shape)}")
        if table.ndim > x.ndim or any(
            t not in (1, n) for t, n in zip(table.shape[-3::-1], x.shape[-3::-1], strict=False)
        ):
            raise ValueError(f"{name} must broadcast against x's {tuple(x.shape)}, got {tuple(table.shape)}")
        return table[..., ::2] if table.shape[-1] == dim else table

    if isinstance(scale, Tensor) and scale.ndim > 0:
        scale = per_pair("scale", scale)
    return rotate_pairs(x, per_pair("cos", cos) * scale, per_pair("sin", sin) * scale)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021) of vectors with `head_dim` channels.

    Holds no table: sines and cosines are evaluated in float64 for the positions asked for, so they depend neither on
    earlier calls nor on the module's dtype or device.

    Args:
        head_dim: channels of a head; even.
        base: the slowest wavelength is about 2 pi base positions.
        interleaved: how channels pair up: (0, 1), (2, 3), ... (as in RoFormer and xPos), or, if False, channel i with
            i + head_dim/2 (as in Llama). Scores are the same if the channels of q and k are permuted alike.

    Raises:
        ValueError: head_dim is odd or not positive, or base is not positive.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0, interleaved: bool = True):
        super().__init__()
        if not is_size(head_dim) or head_dim % 2:
            raise ValueError(f"head_dim must be even and above 0, got {head_dim}")
        if not base > 0:
            raise ValueError(f"base must be above 0, got {base}")
        self.head_dim = head_dim
        self.base = float(base)
        self.interleaved = interleaved

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base:g}, interleaved={self.interleaved}"

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Rotate row j of x (..., seq_len, head_dim) by position offset + j; x's shape and dtype.

        Raises:
            ValueError: x is no floating-point tensor of that width, or offset is negative or no integer.
        """
        return self._rotated(x, self._table(x, self._positions(x, offset)))

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """q and k for attention scores that depend on position differences alone: what attention calls.

        Args:
            q, k: (..., n, head_dim); their n may differ.
            q_positions, k_positions: integers, (n,) or with leading dimensions that broadcast against those of q and k.
            origin: the position from which both are measured. Scores do not depend on it; how far the intermediate
                numbers are from 1 does.
        """
        q_table = self._table(q, q_positions - origin)
        k_table = q_table if k_positions is q_positions else self._table(k, k_positions - origin)
        return self._rotated(q, q_table), self._rotated(k, k_table)

    def max_span(self, dtype: torch.dtype) -> int:
        """How many consecutive positions one origin, in their middle, can serve for q and k of `dtype`: no limit."""
        return sys.maxsize

    def _table(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotary_table(positions, self.head_dim, self.base, at_least_float32(x.dtype))

    def _rotated(self, x: Tensor, table: Tensor, factor: Tensor | None = None) -> Tensor:
        return Rotation.apply(x, table, factor, self.interleaved, False)  # type: ignore[return-value]

    def _positions(self, x: Tensor, offset: int | Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.head_dim:
            raise ValueError(f"x must have shape (..., seq_len, head_dim={self.head_dim}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
        if isinstance(offset, Tensor):
            if offset.numel() != 1 or offset.is_floating_point():
                raise ValueError(f"offset must be one integer, got {offset.dtype} {tuple(offset.shape)}")
        elif not isinstance(offset, int) or offset < 0:
            raise ValueError(f"offset must be 0 or above and an integer, got {offset}")
        return torch.arange(x.shape[-2], device=x.device) + offset
