"""XPOS: rotary position embedding whose channel pairs also decay with distance (Sun et al. 2022, arXiv 2212.10554).

Axes: n sequence, d head dimension, i = d/2 pairs of channels. Pair i decays by zeta_i^(1/scale_base) a position.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from xpos_zoo.rotary import RotaryEmbedding, at_least_float32, rotate_pairs

GAMMA = 0.4  # of the authors' code: zeta runs from GAMMA / (1 + GAMMA) = 2/7 up to almost 1


def zetas(head_dim: int) -> list[float]:
    """zeta_i = (i / (d/2) + 0.4) / 1.4 for the d/2 pairs."""
    return [(2 * i / head_dim + GAMMA) / (1 + GAMMA) for i in range(head_dim // 2)]


class XPOS(RotaryEmbedding):
    """xPos: the rates of rotary embedding with lambda_i = ln(zeta_i) / scale_base, so that scores decay with distance.

    Args:
        head_dim: channels of a head; even.
        scale_base: positions over which pair i decays by zeta_i. Half the training length is right; the authors' 512
            belongs to their 1024. May be set anew.
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
        self.scale_base = scale_base
        self.register_buffer("scale", torch.tensor(zetas(self.head_dim), dtype=torch.float32))
        self.register_load_state_dict_pre_hook(replace_scale)

    @property
    def scale_base(self) -> float:
        return self._scale_base

    @scale_base.setter
    def scale_base(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"scale_base must be above 0 and finite, got {value}")
        self._scale_base = value
        self.rates = [
            complex(math.log(zeta) / value, rate.imag) if rate else 0j
            for zeta, rate in zip(zetas(self.head_dim), self.rates, strict=True)
        ]

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
        cos, sin, up, down = self.table(positions, at_least_float32(x.dtype), exponents)
        return rotate_pairs(x, cos, sin, down if downscale else up, self.interleaved)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # .half() rounded it, .to_empty() left it undefined
        self.scale = torch.tensor(zetas(self.head_dim), dtype=torch.float32, device=self.scale.device)
        return self


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
