"""The four documented functions of torchscale and zeta.

Axes: i = dim/2 channel pairs, side by side.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from xpos_zoo.rotary import cos_and_sin, in_turns, rotary_rates
from xpos_zoo.rotation import at_least_float32, rotate_pairs


def fixed_pos_embedding(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(sin, cos)` of n * 10000^(-j/dim) in row n and column j, each of x's shape (seq_len, dim) and dtype.

    Only x's shape, device and dtype are used. ValueError if x is not two-dimensional.
    """
    if x.ndim != 2:
        raise ValueError(f"x must have shape (seq_len, dim), got {tuple(x.shape)}")
    seq_len, dim = x.shape
    dtype = x.dtype if x.is_floating_point() else torch.float32
    # Column j has the frequency of pair j of 2 dim channels. A compiler takes the length of a range as a plain number.
    turns = torch.tensor(in_turns(rotary_rates(2 * len(range(dim)))), dtype=torch.int64, device=x.device)
    cos, sin = cos_and_sin(torch.arange(seq_len, device=x.device), turns, at_least_float32(dtype)).to(dtype)
    return sin, cos


def rotate_every_two(x: Tensor) -> Tensor:
    """Turn each channel pair (a, b) of x (..., seq_len, dim) into (-b, a); ValueError if dim is odd."""
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, got shape {tuple(x.shape)}")
    a, b = rearrange(x, "... (i two) -> ... i two", two=2).unbind(-1)
    return rearrange(torch.stack((-b, a), -1), "... i two -> ... (i two)")


def duplicate_interleave(m: Tensor) -> Tensor:
    """Repeat each column of m twice, side by side: (..., d) becomes (..., 2d); ValueError if m is a scalar."""
    if m.ndim < 1:
        raise ValueError("m must have at least one dimension, got a scalar")
    return repeat(m, "... d -> ... (d two)", two=2)


def apply_rotary_pos_emb(x: Tensor, sin: Tensor, cos: Tensor, scale: float | Tensor = 1) -> Tensor:
    """Rotate the interleaved pairs of x (..., seq_len, dim) by the tables and multiply by `scale`; x's shape and dtype.

    Args:
        x: (batch, seq_len, dim), or with any leading dimensions.
        sin, cos: (seq_len, dim/2), a column for each pair; or (seq_len, dim), as `fixed_pos_embedding` gives it for x's
            own width: column 2i is then used for pair i. Leading dimensions broadcast against x's.
        scale: a number, or a tensor of either table width, or of width 1.

    ValueError if x is no floating-point tensor, dim is odd or zero, or a table's shape does not fit x.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., seq_len, dim) with an even dim above 0, got {tuple(x.shape)}")
    dim = x.shape[-1]

    def per_pair(name: str, table: Tensor, widths: tuple[int, ...]) -> Tensor:
        rows = zip(table.shape[-2::-1], x.shape[-2::-1], strict=False)  # compared from the last dimension on
        if not 0 < table.ndim <= x.ndim or table.shape[-1] not in widths or any(t not in (1, n) for t, n in rows):
            raise ValueError(
                f"{name} must be {' or '.join(map(str, widths))} wide and broadcast against the other dimensions of "
                f"x {tuple(x.shape)}, got {tuple(table.shape)}"
            )
        return table[..., ::2] if table.shape[-1] == dim else table

    if isinstance(scale, Tensor) and scale.ndim > 0:
        scale = per_pair("scale", scale, (1, dim // 2, dim))
    cos, sin = (per_pair(name, table, (dim // 2, dim)) for name, table in (("cos", cos), ("sin", sin)))
    return rotate_pairs(x, cos * scale, sin * scale)
