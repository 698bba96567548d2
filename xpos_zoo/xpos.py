"""XPOS: rotary position embedding whose channel pairs also decay with distance (Sun et al. 2022, arXiv 2212.10554).

Axes: n sequence, d head dimension, i = d/2 pairs of channels. Pair i decays by zeta_i^(1/scale_base) a position.
"""

import math

import torch
from torch import Tensor

from xpos_zoo.rotary import RotaryEmbedding, at_least_float32, write_rotations

GAMMA = 0.4  # of the authors' code: zeta runs from GAMMA / (1 + GAMMA) = 2/7 up to almost 1


def decay_rates(head_dim: int, device: torch.device | None = None) -> Tensor:
    """zeta_i = (i / (d/2) + 0.4) / 1.4 for the d/2 pairs, in float64."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    return (pair / head_dim + GAMMA) / (1 + GAMMA)


@torch.library.custom_op("xpos_zoo::xpos_table", mutates_args=())
def xpos_table(
    positions: Tensor, exponents: Tensor, head_dim: int, base: float, scale_base: float, dtype: torch.dtype
) -> Tensor:
    """The `rotary_table` of positions, zeta^(exponents / scale_base) and its inverse, evaluated in float64.

    (4, *positions.shape, head_dim / 2). An operator of its own for the same reasons.
    """
    table = positions.new_empty((4, *positions.shape, head_dim // 2), dtype=dtype)
    write_rotations(positions, head_dim, base, table)
    log_decay = decay_rates(head_dim, positions.device).log() / scale_base
    decay = (exponents[..., None] * log_decay).exp_()  # in half the time of a power
    table[2] = decay
    table[3] = decay.reciprocal_()
    return table


@xpos_table.register_fake
def _(
    positions: Tensor, exponents: Tensor, head_dim: int, base: float, scale_base: float, dtype: torch.dtype
) -> Tensor:
    return positions.new_empty((4, *positions.shape, head_dim // 2), dtype=dtype)


class XPOS(RotaryEmbedding):
    """xPos: q is multiplied by zeta^(n/scale_base), k by its inverse, so that scores decay with distance.

    Args:
        head_dim: channels of a head; even.
        scale_base: positions over which pair i decays by zeta_i. Half the training length is right; the authors' 512
            belongs to their 1024.
        base, interleaved: see `RotaryEmbedding`.

    `scale` holds zeta as a float32 buffer, (head_dim / 2,), so that state dicts are those of torchscale and zeta. It is
    a function of head_dim: computation evaluates it afresh in float64, and loading other values is an error.

    Raises:
        ValueError: head_dim is odd or not positive, or base or scale_base is not positive.
    """

    scale: Tensor

    def __init__(self, head_dim: int, scale_base: float = 512, *, base: float = 10000.0, interleaved: bool = True):
        super().__init__(head_dim, base=base, interleaved=interleaved)
        self.scale_base = scale_base
        self.register_buffer("scale", decay_rates(head_dim).float())

    @property
    def scale_base(self) -> float:
        return self._scale_base

    @scale_base.setter
    def scale_base(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"scale_base must be above 0 and finite, got {value}")
        self._scale_base = value

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_base={self.scale_base:g}"

    def forward(self, x: Tensor, offset: int | Tensor = 0, downscale: bool = False) -> Tensor:
        """Encode x (..., seq_len, head_dim), all queries or all keys, as torchscale and zeta do; x's shape and dtype.

        Row j is rotated by position offset + j and scaled by zeta^(e/scale_base) with the length-centred
        e = offset + j - (seq_len + offset + 1) // 2. Queries and keys therefore fit together if seq_len + offset is the
        same for both. The factors grow with seq_len, as theirs do, and overflow at about 140 scale_base rows in float32
        and 17 in float16. `rotate` needs no such care.

        Args:
            x: any floating dtype; computed in float32 at least.
            offset: position of x's first row; an integer or an integer tensor with one element.
            downscale: False for queries, True (the inverse scaling) for keys.

        Raises:
            ValueError: x is no floating-point tensor of that width, or offset is negative or no integer.
        """
        positions = self._positions(x, offset)
        origin = (x.shape[-2] + offset + 1) // 2
        table = self._table(x, positions, positions - origin)
        return self._rotated(x, table[:2], table[3 if downscale else 2])

    def rotate(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, origin: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """As `RotaryEmbedding.rotate`, with q scaled by zeta^((q_positions - origin) / scale_base), k inversely."""
        q_table = self._table(q, q_positions - origin)
        k_table = q_table if k_positions is q_positions else self._table(k, k_positions - origin)
        return self._rotated(q, q_table[:2], q_table[2]), self._rotated(k, k_table[:2], k_table[3])

    def max_span(self, dtype: torch.dtype) -> int:
        """How many consecutive positions one origin, in their middle, can serve for q and k of `dtype`.

        No factor then exceeds 2^32, or 2^4 in float16, so that even a score that a causal mask hides, the product of
        two such factors, stays finite in the float32 in which attention accumulates. float16 has few bits to spare:
        queries and keys may be as large as 4000, and as small as 0.001 before they lose precision.
        """
        bits = 4 if dtype == torch.float16 else 32
        bits_per_position = -math.log2(GAMMA / (1 + GAMMA)) / self.scale_base
        return max(1, int(2 * bits / bits_per_position))

    def _table(self, x: Tensor, positions: Tensor, exponents: Tensor | None = None) -> Tensor:
        """cos, sin, what queries and what keys at these positions are multiplied by."""
        exponents = positions if exponents is None else exponents
        dtype = at_least_float32(x.dtype)
        return xpos_table(positions, exponents, self.head_dim, self.base, float(self.scale_base), dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._renew_scale()  # .half() rounded it, .to_empty() left it undefined
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        loaded = state_dict.get(prefix + "scale")
        if loaded is not None and loaded.shape == self.scale.shape and not loaded.is_meta:
            expected = decay_rates(self.head_dim, loaded.device)
            if not torch.allclose(loaded.double(), expected, rtol=torch.finfo(torch.bfloat16).eps):
                error_msgs.append(
                    f"{prefix}scale must be (i / (head_dim/2) + 0.4) / 1.4 for head_dim={self.head_dim}, got {loaded}"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._renew_scale()

    def _renew_scale(self) -> None:
        self.scale = decay_rates(self.head_dim, self.scale.device).float()
