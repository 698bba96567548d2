"""The formulas that the library is tested against, in float64, written to be read.

    score(n, m) = sum_i zeta_i^((n - m) / s) Re(q_i conj(k_i) exp(1j (n - m) theta_i))
    theta_i = base^(-2i/d),  zeta_i = (i / (d/2) + 0.4) / 1.4;  without the decay it is plain rotary
    logit(n, m) = score(n, m) / sqrt(d) + bias(n - m)

Axes: b batch, h query heads, g key-value heads, n queries, m keys, d head dimension, i = d/2 channel pairs. Queries are
those of the last n of m positions.
"""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from builders import double, normal
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xpos_zoo import (
    XPOS,
    DistanceBias,
    MultiHeadAttention,
    RotaryEmbedding,
    ScalableSoftmax,
    ScaleInvariant,
    SoftTail,
)


class Encoding(NamedTuple):
    """What a position module is told, plain rotary if scale_base is None; and what logits become by distance."""

    scale_base: float | None = None
    base: float = 10000.0
    interleaved: bool = True
    max_wavelength: float | None = None
    biases: tuple[DistanceBias, ...] = ()

    def module(self, head_dim: int) -> RotaryEmbedding:
        kind = RotaryEmbedding if self.scale_base is None else partial(XPOS, scale_base=self.scale_base)
        return kind(head_dim, base=self.base, max_wavelength=self.max_wavelength, interleaved=self.interleaved)

    def with_biases(self, *biases: DistanceBias | None) -> "Encoding":
        return self._replace(biases=tuple(bias for bias in biases if bias is not None))

    def angles(self, head_dim: int) -> Tensor:
        """Radians a position of each pair; 0 for those whose wavelength is above max_wavelength."""
        each = theta(head_dim, self.base)
        return each if self.max_wavelength is None else torch.where(2 * math.pi / each <= self.max_wavelength, each, 0)

    def decays(self, head_dim: int) -> Tensor:
        """The factor a position of each pair; 1 for those that do not decay."""
        if self.scale_base is None:
            return torch.ones(head_dim // 2, dtype=torch.float64)
        return torch.where(self.angles(head_dim) == 0, 1, zeta(head_dim) ** (1 / self.scale_base))


def encoding_of(module: RotaryEmbedding) -> Encoding:
    scale_base = module.scale_base if isinstance(module, XPOS) else None
    return Encoding(scale_base, module.base, module.interleaved, module.max_wavelength)


def sloped(distance: Tensor) -> Tensor:
    """ALiBi's bias for four heads, with slopes that halves can hold at distances below 128."""
    return -distance * torch.tensor([0.5, 0.25, 0.125, 0.0625], device=distance.device)[:, None, None]


def theta(head_dim: int, base: float = 10000.0) -> Tensor:
    return torch.tensor([base ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)


def zeta(head_dim: int) -> Tensor:
    return torch.tensor([(i / (head_dim / 2) + 0.4) / 1.4 for i in range(head_dim // 2)], dtype=torch.float64)


def pairs(x: Tensor, interleaved: bool = True) -> Tensor:
    """The channel pairs of x (..., d) as complex numbers (..., i)."""
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.complex(real.double(), imaginary.double())


def channels(z: Tensor, interleaved: bool = True) -> Tensor:
    """The inverse of `pairs`."""
    return torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)


def distances(q_positions: Tensor, k_positions: Tensor, mask: Tensor | None) -> Tensor:
    """n - m for each query and key; 0 where a mask hides the key, since the true future score may be infinite."""
    distance = (q_positions[..., :, None] - k_positions[..., None, :]).double()
    return distance if mask is None else torch.where(mask, distance, 0)


def terms(
    q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, encoding: Encoding, mask: Tensor | None = None
) -> Tensor:
    """Those of the formula for q (..., n, d), k (..., m, d): complex (..., n, m, i); merely finite where hidden."""
    distance, rates = distances(q_positions, k_positions, mask)[..., None], 1j * encoding.angles(q.shape[-1])
    q, k = pairs(q, encoding.interleaved), pairs(k, encoding.interleaved)
    products = q[..., :, None, :] * k[..., None, :, :].conj()
    return encoding.decays(2 * q.shape[-1]) ** distance * products * torch.exp(distance * rates)


def scores(*of: Any) -> Tensor:
    """Of what `terms` takes: (..., n, m)."""
    return terms(*of).real.sum(-1)


def score_sizes(*of: Any) -> Tensor:
    """sum_i zeta_i^((n - m) / s) |q_i| |k_i|: what errors in the factors of a score are relative to."""
    return terms(*of).abs().sum(-1)


def encode(x: Tensor, angles_at: Tensor, decay_at: Tensor | None, encoding: Encoding) -> Tensor:
    """x (..., n, d) rotated by positions angles_at, and scaled by zeta^(decay_at / s) if the encoding decays."""
    head_dim = x.shape[-1]
    z = pairs(x, encoding.interleaved) * torch.exp(1j * angles_at.double()[..., None] * encoding.angles(head_dim))
    if decay_at is not None:
        z = z * encoding.decays(head_dim) ** decay_at.double()[..., None]
    return channels(z, encoding.interleaved)


def visible(n: int, block_size: int | None = None, window_size: int | None = None) -> Tensor:
    """Which key (column) each query (row) sees: all before it, of its own block and the one before if in blocks, or of
    the last window_size tokens."""
    query, key = torch.arange(n)[:, None], torch.arange(n)
    mask = key <= query
    if block_size is not None:
        mask = mask & (query // block_size - key // block_size <= 1)
    if window_size is not None:
        mask = mask & (query - key < window_size)
    return mask


def grouped(q: Tensor, t: Tensor) -> Tensor:
    """t (b, g, m, d) with its heads repeated to those of q (b, h, n, d)."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def placed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (b, h, n, d), k (b, g, m, d) repeated to h heads, and their positions: m in all, q has the last n."""
    k = grouped(q, k)
    at = torch.arange(k.shape[-2])
    return q, k, at[k.shape[-2] - q.shape[-2] :], at


def gains_and_biases(q: Tensor, k: Tensor, mask: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """What logits of q (b, h, n, d) and k (b, g, m, d) are multiplied by, and what is then added to them.

    A soft tail is -power ln(m / l) at distances m beyond l; `ScaleInvariant` is that of arXiv 2505.17083, with its
    discount from l on.
    """
    distance = distances(*placed(q, k)[2:], mask)
    gain, total = torch.ones_like(distance), torch.zeros_like(distance)
    for bias in encoding.biases:
        if isinstance(bias, ScaleInvariant):
            logarithm = torch.log(distance / bias.tau + 1)
            far = distance >= (bias.trained_length or math.inf)
            gain, total = gain * (2 * logarithm + 1).sqrt(), total - 2 * logarithm - bias.discount * far.double()
        elif isinstance(bias, SoftTail):
            length = bias.trained_length
            total = total + torch.where(distance > length, -bias.power * torch.log(distance / length), 0)
        else:
            total = total + bias(distance).double()
    return gain, total


def logits(q: Tensor, k: Tensor, mask: Tensor, encoding: Encoding) -> Tensor:
    """Those of q (b, h, n, d) and k (b, g, m, d), minus infinity where mask (n, m) is False: (b, h, n, m)."""
    gain, bias = gains_and_biases(q, k, mask, encoding)
    return (gain * scores(*placed(q, k), encoding, mask) / math.sqrt(q.shape[-1]) + bias).masked_fill(~mask, -math.inf)


def logit_sizes(q: Tensor, k: Tensor, mask: Tensor, encoding: Encoding) -> Tensor:
    """`score_sizes` over sqrt(d) and the size of the bias, 0 where mask is False; shapes as in `logits`."""
    gain, bias = gains_and_biases(q, k, mask, encoding)
    size = gain * score_sizes(*placed(q, k), encoding, mask) / math.sqrt(q.shape[-1]) + bias.abs()
    return size.masked_fill(~mask, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, encoding: Encoding) -> Tensor:
    """Softmax attention of q (b, h, n, d) on k, v (b, g, m, d) where mask (n, m) is True: (b, h, n, d), float64."""
    return logits(q, k, mask, encoding).softmax(-1) @ grouped(q, v).double()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, encoding: Encoding) -> Tensor:
    """SDPA in the dtype of q, k, v on exactly encoded inputs: how well that dtype can do.

    Each query comes with keys of its own, decayed by their distance to it, so that no factor exceeds 1.
    """
    gain, bias = gains_and_biases(q, k, mask, encoding)
    q, k, q_at, k_at = placed(q, k)
    b, h, n, d = q.shape
    m = k.shape[-2]
    if encoding.biases:  # in float32, which the CPU's attention takes with every dtype
        mask = torch.where(mask, bias.to(torch.promote_types(q.dtype, torch.float32)), -math.inf)
    distance = (q_at[:, None] - k_at).clamp(min=0)
    rows = encode(q, q_at, None, encoding).to(q.dtype)
    keys = encode(k[..., None, :, :].expand(b, h, n, m, d), k_at.expand(n, m), distance, encoding)
    keys = (gain[..., None] * keys).to(q.dtype)
    with torch.autocast("cpu", enabled=False):
        out = scaled_dot_product_attention(
            rows.reshape(b * h * n, 1, 1, d),
            keys.reshape(b * h * n, 1, m, d),
            grouped(q, v)[..., None, :, :].expand(b, h, n, m, d).reshape(b * h * n, 1, m, d),
            attn_mask=mask.expand(b, h, n, m).reshape(b * h * n, 1, 1, m),
        )
    return out.reshape(b, h, n, d)


encodings = st.builds(
    Encoding,
    scale_base=st.sampled_from([None, 0.05, 0.3, 1, 8, 512]),
    base=st.sampled_from([100.0, 10000.0]),
    interleaved=st.booleans(),
    max_wavelength=st.sampled_from([None, 7.0, 50.0]),
    biases=st.just(()),
)
tails = st.builds(SoftTail, st.sampled_from([0.5, 4.0]), st.integers(1, 45))
tails |= st.builds(ScaleInvariant, st.sampled_from([0.5, 10.0]), st.sampled_from([0.0, 2.0]), st.integers(1, 45))


def assert_attends_exactly(actual: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, encoding: Encoding) -> None:
    """Output, and gradients if q, k and v ask for them, as `assert_as_exact` says."""
    upstream = normal(99, *actual.shape, dtype=q.dtype)

    def with_gradients(output: Tensor) -> list[Tensor]:
        if not q.requires_grad:
            return [output]
        found = zip(gradients(output, upstream, (q, k, v)), (q, k, v), strict=True)
        return [output, *(gradient * t.detach().double() for gradient, t in found)]  # alike, whatever size inputs have

    outputs = (actual, *(attend(q, k, v, mask, encoding) for attend in (attention, plain_attention)))
    logit = logit_sizes(q, k, mask, encoding).max().item() if q.numel() else 0
    uncancelled = attention(q, k, v.abs(), mask, encoding).norm().item()  # a mean of many values may be small
    assert_as_exact(tuple(map(with_gradients, outputs)), logit, encoding, q.dtype, size=uncancelled)


def query_factor(scaling: Any, visible_keys: Tensor) -> Tensor:
    n, length = visible_keys.double(), scaling.trained_length
    if isinstance(scaling, ScalableSoftmax):
        return torch.log(n + math.e) / math.log(length + math.e)
    return 1 + scaling.coefficient * torch.log(n / length).clamp(min=0)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least, rounded once to x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight).to(x.dtype)


def projected(
    module: MultiHeadAttention, x: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Encoding]:
    """q (b, h, n, d), k and v (b, g, n, d), mask and encoding: what `module` makes of x before it attends."""
    mask = visible(x.shape[1], module.block_size, module.window_size)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    q, k, v = (
        linear(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    if module.qk_norm:
        q, k = rms_norm(q, module.q_norm), rms_norm(k, module.k_norm)
    if module.query_scaling is not None:
        q = (q * query_factor(module.query_scaling, mask.sum(-1))[..., None]).to(q.dtype)
    assert isinstance(module.positions, RotaryEmbedding)
    encoding = encoding_of(module.positions)
    return q, k, v, mask, encoding.with_biases(module.distance_bias)


def multi_head_attention(
    module: MultiHeadAttention, x: Tensor, attend: Callable[..., Tensor] = attention, document_ids: Tensor | None = None
) -> Tensor:
    """What `module` gives for x (b, n, embed_dim), in the dtype of both: give it `double(module)` for the oracle."""
    attended = attend(*projected(module, x, document_ids)).transpose(1, 2).flatten(2)
    return module.out_proj(attended if module.gate_proj is None else attended * torch.sigmoid(module.gate_proj(x)))


def assert_block_is_exact(
    module: MultiHeadAttention,
    x: Tensor,
    run: Callable[[MultiHeadAttention, Tensor], Tensor] = MultiHeadAttention.__call__,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
    **documents: Tensor | None,
) -> None:
    """Output of `run(module, x)` and its gradients by x and every parameter, as `assert_as_exact` says."""
    upstream = normal(99, *x.shape, dtype=x.dtype)

    def results(run: Callable[..., Tensor], module: MultiHeadAttention, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None and x.dtype != torch.float64):
            output = run(module, x, **documents)
        return [output, *gradients(output, upstream.to(x.device), (x, *module.parameters()))]

    exact = results(multi_head_attention, double(module), x.double())
    plain = results(partial(multi_head_attention, attend=plain_attention), module, x)
    actual = results(run, copy.deepcopy(module).to(device), x.to(device))
    q, k, _, mask, encoding = projected(double(module), x.double(), **documents)
    logit = logit_sizes(q, k, mask, encoding).max().item() if q.numel() else 0
    assert_as_exact((actual, exact, plain), logit, encoding, x.dtype, autocast)


def assert_as_exact(
    results: tuple[list[Tensor], ...],
    logit: float,
    encoding: Encoding,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    size: float = 0.0,
) -> None:
    """Actual results, exact ones and those of the formula's steps in the same dtypes, with logits of up to that size L.

    Errors are at most those of the steps and, relative to the largest result or `size`, what comes of
    - computing: scores have a relative error of 32 roundoffs of float32, or of float64 with inputs of that; a bias is
      float32. A weight is wrong by twice L times that, gradients use the weights twice;
    - luck, of one computation that rounds as another does: rounding q and k makes a logit wrong by 2 L roundoffs, a
      weight by twice that, a gradient by four times; weights, their gradient, the result, and sums over heads are
      rounded too. Over many rows such errors are alike in their sum, up to one part in the root of their number.
    """
    largest = max(size, *(t.norm().item() for t in results[1]))
    computed_in = torch.promote_types(dtype, torch.float32) if not encoding.biases else torch.float32
    for ours, right, reachable in zip(*results, strict=True):
        assert ours.dtype == reachable.dtype
        assert ours.shape == right.shape
        assert ours.isfinite().all()
        computing = 32 * (1 + 4 * logit) * roundoff(computed_in)
        luck = (4 + 8 * logit) * roundoff(autocast or dtype) / max(1, right.shape[:-1].numel()) ** 0.5
        assert difference(ours.cpu(), right) <= difference(reachable, right) + (computing + luck) * largest


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to dtype: 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def difference(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| in the 2-norm over all entries."""
    return (actual.double() - expected.double()).norm().item()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`difference` over |expected|; 0 if both are zero or empty."""
    error = difference(actual, expected)
    return error / expected.double().norm().item() if error else 0.0


def gradients(output: Tensor, upstream: Tensor, inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """d(output . upstream) / d(each input)."""
    return torch.autograd.grad(output, tuple(inputs), upstream.to(output.dtype))
