"""Positions as rates: how channel pairs are rotated and scaled. The documented functions, and `RotaryEmbedding`.

Axes: n sequence, d head dimension, i = d/2 pairs of channels, each one complex number. With the rate
r_i = lambda_i + 1j theta_i, a query at position n is multiplied by exp(n r_i) and a key at m by exp(-m conj(r_i)), so
that scores depend on n - m alone. Plain rotary embedding (Su et al. 2021, RoFormer, eq. 34) has theta_i = base^(-2i/d)
and no lambda.
"""

import cmath
import math
import struct
import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from xpos_zoo.checks import as_integer


def rotary_rates(head_dim: int, base: float = 10000.0) -> tuple[complex, ...]:
    """1j base^(-2i/d), the rates of plain rotary embedding."""
    return tuple(1j * base ** (-2 * i / head_dim) for i in range(head_dim // 2))


def as_turns(rates: Sequence[complex]) -> list[int]:
    """How far each rate turns in one position, in 2^-64 turns, as signed integers of 64 bits."""
    return [(round(rate.imag / (2 * math.pi) * 2**64) + 2**63) % 2**64 - 2**63 for rate in rates]


def sine(phase: Tensor, dtype: torch.dtype) -> Tensor:
    """The sine of int64 phases in 2^-64 turns, which wrap around at a whole turn; in float32 within 1e-7."""
    quadrant = ((phase >> 61) + 1) >> 1
    x = (phase - (quadrant << 62)).to(dtype) * (math.pi / 2**63)  # at most an eighth of a turn
    if dtype == torch.float64:
        sin, cos = x.sin(), x.cos()
    else:  # Cephes' sinf and cosf; what torch.sin becomes on CUDA needs several times the registers
        z = x * x
        sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
        cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1
    return torch.where((quadrant & 1) == 0, sin, cos) * (1 - (quadrant & 2))


def cos_and_sin(positions: Tensor, turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of integer positions (...) times `as_turns` (i,): (2, ..., i)."""
    row = torch.arange(2, device=positions.device).view(2, *[1] * positions.ndim, 1)
    return sine(positions[..., None] * turns + ((1 - row) << 62), dtype)  # a cosine is a sine a quarter turn ahead


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of `dtype` are rotated: never half precision."""
    return torch.promote_types(dtype, torch.float32)


def rotate_pairs(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    factor: Tensor | None = None,
    interleaved: bool = True,
    conjugate: bool = False,
    packed: bool = False,
) -> Tensor:
    """Channel pairs of x (..., d), as complex numbers, times `factor * (cos + 1j * sin)`, tables (..., i); x's dtype.

    `conjugate` negates the sine. `packed` loads and stores interleaved pairs at once, which autograd cannot follow.
    Rounding to x's dtype comes before pairs are joined, so that the compiler makes one kernel of it.
    """
    layout, axis = ("i two", -1) if interleaved else ("two i", -2)
    a, b = unpack(x) if packed else rearrange(x, f"... ({layout}) -> ... {layout}", two=2).unbind(axis)
    if factor is None:  # so that gradients are rounded once, too
        a, b = (t.to(torch.promote_types(t.dtype, cos.dtype)) for t in (a, b))
    else:
        a, b = a * factor, b * factor
    a, b = (a * cos + b * sin, b * cos - a * sin) if conjugate else (a * cos - b * sin, b * cos + a * sin)
    if packed:
        return pack(a, b, x.dtype)
    return rearrange(torch.stack((a.to(x.dtype), b.to(x.dtype)), axis), f"... {layout} -> ... ({layout})")


def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both numbers of each bfloat16 or float32 pair of x (..., d), in float32, (..., i) each."""
    # A pair is loaded as one integer of twice the width: compilers make loads of every other number slow.
    if x.dtype == torch.float32:
        pair = x.contiguous().view(torch.int64)
        return pair.to(torch.int32).view(torch.float32), (pair >> 32).to(torch.int32).view(torch.float32)
    pair = x.contiguous().view(torch.int32)
    return (pair << 16).view(torch.float32), (pair & -0x10000).view(torch.float32)


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
    """`rotate_pairs` for a compiler: pairs may go packed, for the gradient is the rotation by the conjugate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, interleaved: bool, conjugate: bool
    ) -> Tensor:
        packed = interleaved and x.dtype in (torch.bfloat16, torch.float32)
        return rotate_pairs(x, cos, sin, factor, interleaved, conjugate, packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tables, ctx.interleaved, ctx.conjugate = inputs
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x = Rotation.apply(gradient.contiguous(), *ctx.saved_tensors, ctx.interleaved, not ctx.conjugate)
        return x, None, None, None, None, None


def fixed_pos_embedding(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(sin, cos)` of n * 10000^(-j/dim) in row n and column j, each of x's shape (seq_len, dim) and dtype.

    Of x only shape, device and dtype count; ValueError if it is not two-dimensional.
    """
    if x.ndim != 2:
        raise ValueError(f"x must have shape (seq_len, dim), got {tuple(x.shape)}")
    seq_len, dim = x.shape
    dtype = x.dtype if x.is_floating_point() else torch.float32
    # Column j has the frequency of pair j of 2 dim channels. A compiler takes the length of a range as a plain number.
    turns = torch.tensor(as_turns(rotary_rates(2 * len(range(dim)))), dtype=torch.int64, device=x.device)
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
        sin, cos: (seq_len, dim/2), a column for each pair; or (seq_len, dim) as `fixed_pos_embedding` gives for x's own
            width, of which column 2i is for pair i. Leading dimensions broadcast against x's.
        scale: a number, or a tensor of either table width, or of width 1.

    ValueError if x is no floating-point tensor, dim is odd or zero, or a table's shape does not fit x.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., seq_len, dim) with an even dim above 0, got {tuple(x.shape)}")
    dim = x.shape[-1]

    def per_pair(name: str, table: Tensor, widths: tuple[int, ...]) -> Tensor:
        rows = zip(table.shape[-2::-1], x.shape[-2::-1], strict=False)  # from the last on
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


class PositionModule(nn.Module):
    """A position encoding: the rates of its channel pairs, and how channels pair up.

    Args:
        rates: lambda_i + 1j theta_i for each of the head_dim / 2 pairs, plain numbers (see the top of this file):
            theta_i rotates, in radians a position; a lambda_i below 0 lets scores decay with distance. May be set anew.
        interleaved: how channels pair up: (0, 1), (2, 3), ... (as in RoFormer and xPos), or, if False, channel i with
            i + head_dim/2 (as in Llama). Scores are the same if the channels of q and k are permuted alike.

    A subclass may also have a method `distance_bias(distance)`, a `DistanceBias`, for every head alike or with an axis
    of heads (h, n, m), as ALiBi's is.

    It keeps no table: angles and decays are evaluated from integers, without float64 (unless q and k are float64), so
    that neither `.half()`, nor autocast, nor an earlier call changes a result. ValueError if a rate is not finite, or a
    lambda is above 0, with which scores would grow with distance.
    """

    increments: Tensor

    def __init__(self, rates: Sequence[complex], interleaved: bool = True):
        super().__init__()
        self.interleaved = interleaved
        self.rates = rates

    @property
    def rates(self) -> tuple[complex, ...]:
        return self._rates

    @rates.setter
    def rates(self, rates: Sequence[complex]) -> None:
        rates = tuple(complex(rate) for rate in rates)
        if len(rates) != len(getattr(self, "_rates", rates)):
            raise ValueError(f"rates must be {len(self._rates)}, one for each pair, got {len(rates)}")
        for rate in rates:
            if not cmath.isfinite(rate) or rate.real > 0:
                raise ValueError(f"rates must be finite, and their real parts at most 0, got {rate}")
        self._rates = rates
        bits = max((-rate.real for rate in rates), default=0.0) / math.log(2)  # a position, of the fastest decay
        self.decays = bits > 0
        self._spans = [max(1, int(2 * most / bits)) if bits else sys.maxsize for most in (4, 32)]
        # Exponents of 2^32 positions fit an int64, and those within a span are exact to 2^-26.
        self._point = max(0, min(60, 30 - math.frexp(bits)[1]))
        self._set_increments(self.increments.device if hasattr(self, "increments") else torch.get_default_device())

    def _set_increments(self, device: torch.device) -> None:
        # No buffer, for averages of weights take these in; never on the meta device, from where nothing brings it back.
        exponents = [rate.real / math.log(2) for rate in self.rates]
        # Turns, fixed-point decays, and decays as bits of float64: in one row, for a compiler might take a dimension of
        # 3 to be one of x.
        words = as_turns(self.rates) + [round(exponent * 2**self._point) for exponent in exponents]
        words += [struct.unpack("q", struct.pack("d", exponent))[0] for exponent in exponents]
        device = torch.device("cpu") if device.type == "meta" else device
        self.increments = torch.tensor(words, dtype=torch.int64, device=device)

    def _apply(self, fn, recurse=True):  # the one place that all of .to(), .half(), .to_empty() come through
        super()._apply(fn, recurse)
        self._set_increments(fn(self.increments).device)
        return self

    def table(self, positions: Tensor, dtype: torch.dtype, exponents: Tensor | None = None) -> Tensor:
        """What pairs at integer positions are multiplied by: (rows, *positions.shape, i) in `dtype`, float32 or wider.

        Rows are cosine, sine and, if the encoding decays, the factors of queries and of keys: at `exponents`, in the
        same shape, if they are given.
        """
        turns, decay, decay_bits = self.increments.to(positions.device).view(3, -1).unbind()
        rows = [cos_and_sin(positions, turns, dtype)]
        if self.decays:
            sign = 1 - 2 * torch.arange(2, device=positions.device).view(2, *[1] * positions.ndim, 1)
            steps = (positions if exponents is None else exponents)[..., None] * sign
            if dtype == torch.float64:
                rows.append(torch.exp2(steps.double() * decay_bits.view(torch.float64)))
            else:
                exponent = steps * decay
                fraction = exponent & (2**self._point - 1)
                factor = torch.exp2(fraction.to(dtype) / 2**self._point)
                rows.append(torch.exp2((exponent >> self._point).to(dtype)) * factor)
        return as_table(rows)

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """q and k whose products depend on position differences alone.

        Args:
            q, k: (..., n, head_dim); their n may differ.
            q_positions, k_positions: integers, (n,) or with leading dimensions that broadcast against those of q and k.
            origin: the position from which both are measured. Scores do not depend on it; how far the intermediate
                numbers are from 1 does.
        """
        q_table = self.table(q_positions - origin, at_least_float32(q.dtype))
        same = k_positions is q_positions and k.dtype == q.dtype
        k_table = q_table if same else self.table(k_positions - origin, at_least_float32(k.dtype))
        return self.rotated(q, q_table), self.rotated(k, k_table, inverse=True)

    def rotated(self, x: Tensor, table: Tensor | None, inverse: bool = False) -> Tensor:
        """Queries, or keys, x (..., d) multiplied by a table (rows, ..., i); unchanged if it is None."""
        if table is None:
            return x
        factor = table[3 if inverse else 2] if len(table) > 2 else None
        rotate = Rotation.apply if torch.compiler.is_dynamo_compiling() else rotate_pairs
        return rotate(x, table[0], table[1], factor, self.interleaved, False)  # type: ignore[return-value]

    def max_span(self, dtype: torch.dtype) -> int:
        """How many consecutive positions one origin, in their middle, can serve for q and k of `dtype`.

        No factor then exceeds 2^32, or 2^4 in float16, so that even a score that a causal mask hides, with two such
        factors, stays finite in float32. In float16 queries and keys may be as large as 4000, and as small as 0.001
        before they lose precision.
        """
        return self._spans[0 if dtype == torch.float16 else 1]  # torch 2.11 compiles no index that is a bool


def as_table(rows: list[Tensor]) -> Tensor:
    """Rows as one tensor that a compiler writes to memory: it would evaluate them anew for every head and batch row."""
    table = torch.cat(rows)
    return torch.as_strided(table, table.shape, table.stride()) if torch.compiler.is_compiling() else table


def within_wavelength(rates: Sequence[complex], max_wavelength: float | None) -> tuple[complex, ...]:
    """The rates, with those whose wavelength 2 pi / theta is above max_wavelength set to 0."""
    if max_wavelength is None:
        return tuple(rates)
    if not max_wavelength > 0:
        raise ValueError(f"max_wavelength must be above 0, or None for all pairs, got {max_wavelength}")
    kept = tuple(rate if rate.imag * max_wavelength >= 2 * math.pi else 0j for rate in rates)
    if not any(kept):
        shortest = 2 * math.pi / max(rate.imag for rate in rates)
        raise ValueError(f"max_wavelength must leave a pair: at least {shortest:.4g}, got {max_wavelength}")
    return kept


class RotaryEmbedding(PositionModule):
    """Rotary position embedding (Su et al. 2021) of vectors with `head_dim` channels.

    Args:
        head_dim: channels of a head; even.
        base: the slowest wavelength is about 2 pi base positions.
        max_wavelength: pairs with a longer wavelength, in positions, are not rotated (p-RoPE, Barbero et al. 2024,
            arXiv 2410.06205); None rotates all.
        interleaved: see `PositionModule`.

    ValueError if head_dim is odd or not positive, base is not positive, or max_wavelength leaves no pair.
    """

    def __init__(
        self, head_dim: int, *, base: float = 10000.0, max_wavelength: float | None = None, interleaved: bool = True
    ):
        head_dim = as_integer("head_dim", head_dim, allowed="even and above 0", even=True)
        if not 0 < base < math.inf:
            raise ValueError(f"base must be above 0 and finite, got {base}")
        super().__init__(within_wavelength(rotary_rates(head_dim, base), max_wavelength), interleaved)
        self.head_dim = head_dim
        self.base = float(base)
        self.max_wavelength = max_wavelength

    def extra_repr(self) -> str:
        longest = "" if self.max_wavelength is None else f"max_wavelength={self.max_wavelength:g}, "
        return f"head_dim={self.head_dim}, base={self.base:g}, {longest}interleaved={self.interleaved}"

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Rotate row j of x (..., seq_len, head_dim) by position offset + j; x's shape and dtype.

        ValueError if x is no floating-point tensor of that width, or offset is negative or no integer.
        """
        positions, _ = self._positions(x, offset)
        cos, sin = self.table(positions, at_least_float32(x.dtype))[:2]
        return rotate_pairs(x, cos, sin, interleaved=self.interleaved)

    def _positions(self, x: Tensor, offset: SupportsIndex | Tensor) -> tuple[Tensor, int | Tensor]:
        """Positions of x's rows, and the offset as a plain number or a tensor."""
        if x.ndim < 2 or x.shape[-1] != self.head_dim:
            raise ValueError(f"x must have shape (..., seq_len, head_dim={self.head_dim}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
        if not isinstance(offset, Tensor):
            offset = as_integer("offset", offset, 0, "0 or above and an integer")
        elif offset.numel() != 1 or offset.is_floating_point():
            raise ValueError(f"offset must be one integer, got {offset.dtype} {tuple(offset.shape)}")
        return torch.arange(x.shape[-2], device=x.device) + offset, offset
