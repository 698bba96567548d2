"""Position encodings: `PositionModule`, `RotaryEmbedding` and `XPOS`. docs/how_it_works.md has the formula.

Axes: n sequence, d head dimension, i = d/2 channel pairs, each read as one complex number with a rate
lambda_i + 1j theta_i. Angles n theta_i are exact at every position n. Decay exp(lambda_i t) depends on a distance t.
"""

import cmath
import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from xpos_zoo.checks import as_integer, as_number
from xpos_zoo.rotation import Rotation, at_least_float32, rotate_pairs

GAMMA = 0.4  # of the authors' code: zeta runs from GAMMA / (1 + GAMMA) = 2/7 up to almost 1
SMALLEST_FACTOR = 2.0**-80  # of a decay; smaller ones are 0


def zetas(head_dim: int) -> list[float]:
    """zeta_i = (i / (d/2) + 0.4) / 1.4 for the d/2 pairs."""
    return [(2 * i / head_dim + GAMMA) / (1 + GAMMA) for i in range(head_dim // 2)]


def rotary_rates(
    head_dim: int, base: float = 10000.0, max_wavelength: float | None = None, scale_base: float | None = None
) -> tuple[complex, ...]:
    """theta_i = base^(-2i/d) (Su et al. 2021, RoFormer) and, with a scale_base, lambda_i = ln(zeta_i) / scale_base.

    Pairs with a wavelength 2 pi / theta_i above max_wavelength have the rate 0; ValueError if none is left.
    """
    thetas = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    decays = [0.0 if scale_base is None else math.log(zeta) / scale_base for zeta in zetas(head_dim)]
    rates = tuple(map(complex, decays, thetas))
    if max_wavelength is not None:
        rates = tuple(rate if rate.imag * max_wavelength >= 2 * math.pi else 0j for rate in rates)
        if not any(rates):
            shortest = 2 * math.pi / thetas[0]
            raise ValueError(f"max_wavelength must leave a pair: at least {shortest:.4g}, got {max_wavelength}")
    return rates


def in_turns(rates: Sequence[complex]) -> list[int]:
    """How far each rate rotates in one position, in 2^-64 turns, as signed integers of 64 bits."""
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
    """Cosine and sine of integer positions (...) times rates `in_turns` (i,): (2, ..., i)."""
    row = torch.arange(2, device=positions.device).view(2, *[1] * positions.ndim, 1)
    return sine(positions[..., None] * turns + ((1 - row) << 62), dtype)  # a cosine is a sine a quarter turn ahead


def materialise(*tables: Tensor) -> tuple[Tensor, ...]:
    """Tables of one shape but for their first dimension; in compiled code, written to memory by one kernel.

    A compiler would otherwise evaluate them again for every head and every row of the batch.
    """
    if not torch.compiler.is_compiling():
        return tables
    joined = torch.cat(tables)
    return torch.as_strided(joined, joined.shape, joined.stride()).split([len(table) for table in tables])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, interleaved: bool) -> Tensor:
    """`rotate_pairs`, in compiled code with a gradient of its own."""
    if torch.compiler.is_dynamo_compiling():
        return Rotation.apply(x, cos, sin, factor, interleaved, False)  # type: ignore[return-value]
    return rotate_pairs(x, cos, sin, factor, interleaved)


class PositionModule(nn.Module):
    """A position encoding: the rates of its channel pairs, and how channels pair up.

    Args:
        rates: lambda_i + 1j theta_i for each of the head_dim / 2 pairs, plain numbers (see the top of this file):
            theta_i rotates, in radians per position; a lambda_i below 0 lets scores decay with distance. May be set
            again later.
        interleaved: how channels pair up: (0, 1), (2, 3), ... (as in RoFormer and xPos), or, if False, channel i with
            i + head_dim/2 (as in Llama). Scores are the same if the channels of q and k are permuted alike.

    It keeps no table: angles and decay are evaluated from integers, without float64 (unless q and k are float64), so
    that neither `.half()`, nor autocast, nor an earlier call changes a result. ValueError if a rate is not finite, or a
    lambda is above 0, with which scores would grow with distance.
    """

    fixed_point_rates: Tensor

    def __init__(self, rates: Sequence[complex], interleaved: bool = True):
        super().__init__()
        if not isinstance(interleaved, bool):
            raise ValueError(f"interleaved must be True or False, got {interleaved!r}")
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
        bits = max((-rate.real for rate in rates), default=0.0) / math.log(2)  # per position, of the fastest decay
        self.decays = bits > 0
        self._spans = [max(1, int(2 * most / bits)) if bits else sys.maxsize for most in (4, 32)]
        # The binary point of decay exponents: those of 2^32 positions fit an int64, those within a span are exact to
        # 2^-26.
        self._point = max(0, min(60, 30 - math.frexp(bits)[1]))
        made = hasattr(self, "fixed_point_rates")
        self.reset_constants(self.fixed_point_rates.device if made else torch.get_default_device())

    def reset_constants(self, device: torch.device) -> None:
        """Make the tensors that follow from the rates anew on `device`, or on the CPU in place of the meta device."""
        # Not a buffer: averages of weights include buffers, and `to_empty` leaves them undefined.
        exponents = [rate.real / math.log(2) for rate in self.rates]
        # Turns, fixed-point decays, and decays as bits of float64: in one row, for a compiler might take a dimension of
        # 3 to be one of x.
        words = in_turns(self.rates) + [round(exponent * 2**self._point) for exponent in exponents]
        words += [struct.unpack("q", struct.pack("d", exponent))[0] for exponent in exponents]
        device = torch.device("cpu") if device.type == "meta" else device
        self.fixed_point_rates = torch.tensor(words, dtype=torch.int64, device=device)

    def _apply(self, fn, recurse=True):  # .to(), .half(), .to_empty() all call this
        super()._apply(fn, recurse)
        self.reset_constants(fn(self.fixed_point_rates).device)
        return self

    def _constants(self, device: torch.device) -> tuple[Tensor, ...]:
        """Turns, decays in fixed point, and decays as bits of float64, (i,) each."""
        return self.fixed_point_rates.to(device).view(3, -1).unbind()

    def angles(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Cosine and sine of each pair's angle at integer positions (...): (2, ..., i), float32 or float64.

        In float32 within 1e-7, at every position.
        """
        return cos_and_sin(positions, self._constants(positions.device)[0], dtype)

    def decay(self, distances: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """exp(lambda_i t) of each pair at integer distances t (...): (..., i), float32 or float64.

        A factor below 2^-80 is 0: the other factor of a score is at most 2^40 wherever this one is used, so that no
        score changes by more than 2^-40 of q and k, and CPUs are slow on the subnormal numbers that would follow.
        """
        factor = self._decay(distances, dtype)
        return torch.where(factor < SMALLEST_FACTOR, 0, factor)

    def _decay(self, distances: Tensor, dtype: torch.dtype) -> Tensor:
        _, decay, decay_bits = self._constants(distances.device)
        if dtype == torch.float64:
            return torch.exp2(distances[..., None].double() * decay_bits.view(torch.float64))
        exponent = distances[..., None] * decay
        fraction = exponent & (2**self._point - 1)
        return torch.exp2((exponent >> self._point).to(dtype)) * torch.exp2(fraction.to(dtype) / 2**self._point)

    def _tables(self, positions: Tensor, exponents: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
        """Cosine, sine and, None without decay, the factors of queries and keys at these exponents, (..., i) each."""
        dtype = at_least_float32(dtype)
        if not self.decays:
            (angles,) = materialise(self.angles(positions, dtype))
            return *angles.unbind(), None, None
        sign = 1 - 2 * torch.arange(2, device=exponents.device).view(2, *[1] * exponents.ndim)
        factors = self._decay(exponents * sign, dtype)
        angles, factors = materialise(self.angles(positions, dtype), factors)
        return *angles.unbind(), *factors.unbind()

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """q and k whose products depend on position differences alone.

        Args:
            q, k: (..., n, head_dim); their n may differ.
            q_positions, k_positions: integers, (n,) or with leading dimensions that broadcast against those of q and k.
            origin: the position from which decay is measured. Scores do not depend on it; how far the intermediate
                numbers are from 1 does.
        """
        q_tables = self._tables(q_positions, q_positions - origin, q.dtype)
        same = k_positions is q_positions and k.dtype == q.dtype
        k_tables = q_tables if same else self._tables(k_positions, k_positions - origin, k.dtype)
        cos, sin, factor, _ = q_tables
        k_cos, k_sin, _, k_factor = k_tables
        return rotate(q, cos, sin, factor, self.interleaved), rotate(k, k_cos, k_sin, k_factor, self.interleaved)

    def max_span(self, dtype: torch.dtype) -> int:
        """How many consecutive positions one origin, in their middle, can serve for q and k of `dtype`.

        No factor then exceeds 2^32, or 2^4 in float16, so that even a score that a causal mask hides, with two such
        factors, stays finite in float32. In float16 queries and keys may be as large as 4000, and as small as 0.001
        before they lose precision.
        """
        return self._spans[0 if dtype == torch.float16 else 1]  # torch 2.11 compiles no index that is a bool


@dataclass(frozen=True, eq=False)
class Rotary:
    """What the queries or the keys of a forward are rotated and scaled by.

    Attributes:
        cos, sin: of each pair's angle, (rows, n, 1, i), rows being b or 1; None if nothing is rotated.
        factor: likewise, or None.
        interleaved: how channels pair up.
    """

    cos: Tensor | None
    sin: Tensor | None
    factor: Tensor | None
    interleaved: bool

    def after(self, count: int) -> "Rotary":
        """Without the first tokens."""
        if count == 0:
            return self
        cos, sin, factor = (None if t is None else t[:, count:] for t in (self.cos, self.sin, self.factor))
        return Rotary(cos, sin, factor, self.interleaved)

    def rotate(self, x: Tensor) -> Tensor:
        """x (b, n, heads, d), rotated and scaled; x's dtype."""
        if self.cos is None or self.sin is None:
            return x
        return rotate(x, self.cos, self.sin, self.factor, self.interleaved)


def make_rotary(
    positions: PositionModule,
    at: Tensor,
    q_exponents: Tensor | None,
    k_exponents: Tensor | None,
    query_factor: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Rotary, Rotary]:
    """For queries and keys of `dtype` at positions (rows, n), the tables in memory.

    Exponents are the distances at which they decay, (1 or rows, n), None for no decay; query_factor, (rows, n) or None,
    is one more factor of queries.
    """
    dtype, scaled = at_least_float32(dtype), query_factor is not None
    if not any(positions.rates) and not scaled:
        unchanged = Rotary(None, None, None, positions.interleaved)
        return unchanged, unchanged
    exponents = [q_exponents if positions.decays else None, k_exponents if positions.decays else None]
    factors = [None if each is None else positions.decay(each.expand_as(at), dtype) for each in exponents]
    if query_factor is not None:
        ones = torch.ones(len(positions.rates), dtype=dtype, device=at.device)
        factors[0] = query_factor.to(dtype)[..., None] * (ones if factors[0] is None else factors[0])
    rows = [positions.angles(at, dtype), *(factor[None] for factor in factors if factor is not None)]
    (cos, sin), *in_memory = (table[..., None, :] for table in materialise(*rows))
    tables = [None if factor is None else in_memory.pop(0)[0] for factor in factors]
    q_rotary, k_rotary = (Rotary(cos, sin, table, positions.interleaved) for table in tables)
    return q_rotary, k_rotary


def argument(name: str) -> Any:
    """A property of one of the numbers that rates follow from; setting it makes them anew."""
    return property(
        lambda module: module._arguments[name], lambda module, value: module._set_arguments(**{name: value})
    )


class RotaryEmbedding(PositionModule):
    """Rotary position embedding (Su et al. 2021) of vectors with `head_dim` channels.

    Args:
        head_dim: channels of a head; even.
        base: the slowest wavelength is about 2 pi base positions. May be set again later.
        max_wavelength: pairs with a longer wavelength, in positions, are not rotated (p-RoPE, Barbero et al. 2024,
            arXiv 2410.06205); None rotates all. May be set again later.
        interleaved: see `PositionModule`.

    ValueError if head_dim is odd or not positive, base or max_wavelength is not positive, or no pair is left to rotate.
    """

    def __init__(
        self, head_dim: int, *, base: float = 10000.0, max_wavelength: float | None = None, interleaved: bool = True
    ):
        head_dim = as_integer("head_dim", head_dim, allowed="even and above 0", even=True)
        self._arguments: dict[str, Any] = {"head_dim": head_dim}
        super().__init__([0j] * (head_dim // 2), interleaved)
        self._set_arguments(base=base, max_wavelength=max_wavelength)

    def _set_arguments(self, **arguments: Any) -> None:
        for name, value in arguments.items():
            arguments[name] = None if value is None and name == "max_wavelength" else as_number(name, value)
        self.rates = rotary_rates(**self._arguments | arguments)
        self._arguments = self._arguments | arguments

    head_dim = property(lambda self: self._arguments["head_dim"])
    base = argument("base")
    max_wavelength = argument("max_wavelength")

    def extra_repr(self) -> str:
        longest = "" if self.max_wavelength is None else f"max_wavelength={self.max_wavelength:g}, "
        return f"head_dim={self.head_dim}, base={self.base:g}, {longest}interleaved={self.interleaved}"

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Rotate row j of x (..., seq_len, head_dim) by position offset + j; x's shape and dtype.

        ValueError if x is no floating-point tensor of that width, or offset is negative or no integer.
        """
        positions, _ = self._positions(x, offset)
        (angles,) = materialise(self.angles(positions, at_least_float32(x.dtype)))
        return rotate_pairs(x, *angles.unbind(), interleaved=self.interleaved)

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


class XPOS(RotaryEmbedding):
    """xPos: the rates of rotary embedding with lambda_i = ln(zeta_i) / scale_base, so that scores decay with distance.

    Args:
        head_dim: channels of a head; even.
        scale_base: positions over which pair i decays by zeta_i. Use half the training length; the authors' 512
            belongs to their 1024. May be set again later.
        max_wavelength: pairs with a longer wavelength, in positions, neither rotate nor decay (partial xPos): they
            are content that is compared at any distance. None: all pairs do.
        base, interleaved: see `RotaryEmbedding`.

    `scale` holds zeta as a float32 buffer, (head_dim / 2,), so that state dicts are those of torchscale and zeta.
    Nothing is computed from it: a state dict may lack it, as RoPE's do; loading other values is an error. ValueError if
    scale_base is not positive, or as `RotaryEmbedding`.
    """

    scale: Tensor

    def __init__(
        self,
        head_dim: int,
        scale_base: float = 512,
        *,
        base: float = 10000.0,
        max_wavelength: float | None = None,
        interleaved: bool = True,
    ):
        super().__init__(head_dim, base=base, max_wavelength=max_wavelength, interleaved=interleaved)
        self._set_arguments(scale_base=scale_base)
        self.register_buffer("scale", torch.tensor(zetas(self.head_dim), dtype=torch.float32))
        self.register_load_state_dict_pre_hook(replace_scale)

    scale_base = argument("scale_base")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_base={self.scale_base:g}"

    def forward(self, x: Tensor, offset: int | Tensor = 0, downscale: bool = False) -> Tensor:
        """Encode x (..., seq_len, head_dim), all queries or all keys, as torchscale and zeta do; x's shape and dtype.

        Row j is rotated by position offset + j and scaled by zeta^(e/scale_base) with the length-centred
        e = offset + j - (seq_len + offset + 1) // 2; `downscale`, for keys, scales by the inverse. Queries and keys
        therefore fit together if seq_len + offset is the same for both. The factors grow with seq_len, as theirs do,
        and overflow at about 140 scale_base rows in float32 and 17 in float16. `rotate` needs no such care: it takes
        queries and keys with the positions of both; the numbers that all of this follows from are `rates`.

        ValueError if x is no floating-point tensor of that width, or offset is neither an integer from 0 on nor an
        integer tensor with one element.
        """
        positions, offset = self._positions(x, offset)
        exponents = positions - (x.shape[-2] + offset + 1) // 2
        cos, sin, up, down = self._tables(positions, exponents, x.dtype)
        return rotate_pairs(x, cos, sin, down if downscale else up, self.interleaved)

    def reset_constants(self, device: torch.device) -> None:
        super().reset_constants(device)
        if "scale" in dict(self.named_buffers()):  # .half() rounded it, .to_empty() left it undefined
            self.scale = torch.tensor(zetas(self.head_dim), dtype=torch.float32, device=self.scale.device)


def replace_scale(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before a state dict is loaded: a `scale` that is missing or, up to its dtype, zeta becomes zeta; others fail."""
    assert isinstance(module, XPOS)
    own = torch.tensor(zetas(module.head_dim), dtype=torch.float32, device="cpu")
    loaded = state_dict.setdefault(prefix + "scale", own if module.scale.is_meta else own.to(module.scale.device))
    if loaded.shape != own.shape or loaded.is_meta:
        return
    if not torch.allclose(loaded.float().cpu(), own, rtol=torch.finfo(torch.bfloat16).eps):
        args[-1].append(
            f"{prefix}scale must be (i / (head_dim/2) + 0.4) / 1.4 for head_dim={module.head_dim}, got {loaded}"
        )
    state_dict[prefix + "scale"] = own.to(loaded.device)
