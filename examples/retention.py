"""xPos outside attention: RetNet's retention (Sun et al. 2023, arXiv 2307.08621), which has no softmax.

A head with decay gamma gives o_n = sum over m <= n of gamma^(n-m) Re(q_n conj(k_m) exp((n-m) r)) v_m, where r are
xPos's rates. In parallel form, for training, that is a masked product of rotated queries and keys. In recurrent form,
for decoding, it is one state that ages by gamma exp(r) a token: constant memory, and nothing that could overflow.

Axes: b batch, h heads, n queries, m keys, d head dimension, i = d/2 pairs of channels, e channels of values.
"""

import torch
from torch import Tensor, einsum

from xpos_zoo import XPOS


def parallel(xpos: XPOS, gamma: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k (b, h, n, d), v (b, h, n, e) and gamma (h,) give (b, h, n, e), all at once."""
    n = torch.arange(q.shape[2])
    decay = (gamma[:, None, None] ** (n[:, None] - n).clamp(min=0)).tril()
    scores = einsum("bhnd,bhmd->bhnm", xpos(q), xpos(k, downscale=True))
    return einsum("bhnm,bhme->bhne", scores * decay, v)


def recurrent(xpos: XPOS, gamma: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, token by token."""
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (q, k))  # channels pair up with their neighbours
    aging = gamma[:, None] * torch.tensor(xpos.rates, dtype=q.dtype).exp()
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for q_n, k_n, v_n in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        state = aging[:, :, None] * state + einsum("bhi,bhe->bhie", k_n.conj(), v_n.to(q.dtype))
        outputs.append(einsum("bhi,bhie->bhe", q_n, state).real)
    return torch.stack(outputs, dim=2)


def main() -> dict[str, float]:
    torch.manual_seed(0)
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))  # RetNet's, a decay a head
    q, k, v = (torch.randn(2, 4, 256, 32, dtype=torch.float64) for _ in range(3))
    xpos = XPOS(head_dim=32)
    exact = recurrent(xpos, gamma, q, k, v)
    errors = {"float64": (parallel(xpos, gamma, q, k, v) - exact).norm() / exact.norm()}
    gamma, q, k, v = (x.float() for x in (gamma, q, k, v))
    for form in (parallel, recurrent):
        errors[f"float32, {form.__name__}"] = (form(xpos, gamma, q, k, v) - exact).norm() / exact.norm()
    return {name: error.item() for name, error in errors.items()}


if __name__ == "__main__":
    print("Relative difference from the recurrent form in float64:")
    for name, value in main().items():
        print(f"  {name:18} {value:.1e}")
