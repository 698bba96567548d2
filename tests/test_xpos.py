"""XPOS: the documented module, and the rotation that attention asks of it.

Axes: b batch, h heads, n sequence, m keys, d head dimension.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from builders import DTYPES, HALVES, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import Encoding, encode, gradients, relative_error, roundoff, score_sizes, scores, zeta
from torch import Tensor

from xpos_zoo import XPOS

FASTEST = math.log2(3.5)  # bits that the fastest pair decays in scale_base positions
SAME = 1000 * roundoff(torch.float64)  # some tens of roundings, each of the size of the largest term


@pytest.mark.parametrize("leading", [(), (2,), (1, 2, 3)])
@pytest.mark.parametrize(
    ("head_dim", "n", "offset", "downscale", "scale_base"),
    [
        (256, 10, 0, False, 512),
        (512, 20, 2, True, 512),
        (8, 30, 1_000_000, False, 1e5),
        (8, 30, 1_000_000, True, 1e5),
        (8, 5, 3, None, None),
        (8, 5, 1_000_000, None, None),
    ],
)
def test_a_sequence_is_encoded_by_the_formula(head_dim, n, offset, downscale, scale_base, leading):
    """The documented examples, and some that end far away; without a decay there is nothing to scale."""
    x, at, encoding = normal(0, *leading, n, head_dim), torch.arange(n) + offset, Encoding(scale_base)
    origin = (n + offset) // 2
    options = {} if downscale is None else {"downscale": downscale}
    actual = encoding.module(head_dim)(x, offset, **options)
    # Cosine, decay, their product, the rotation's product and sum: five roundings.
    expected = encode(x, at, origin - at if downscale else at - origin, encoding)
    assert relative_error(actual, expected) <= 5 * roundoff(torch.float32)


@given(
    head_dim=st.integers(1, 16).map(lambda i: 2 * i),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    start=st.sampled_from([0, 1, 77, 4096, 999_988]),
    lag=st.integers(-12, 12),
    shift=st.integers(-20, 20),
    scale_base=st.sampled_from([None, 0.5, 1.0, 4.0, 64.0, 100.5, 512.0, 4096.0]),
    base=st.sampled_from([100.0, 10000.0, 500000.0]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
)
def test_scores_equal_the_formula(head_dim, n, m, start, lag, shift, scale_base, base, dtype, interleaved):
    encoding = Encoding(scale_base, base, interleaved)
    q_at, k_at, origin = torch.arange(n) + start, torch.arange(m) + start + lag, start + shift
    bits = (torch.cat((q_at, k_at)) - origin).abs().max().item() * FASTEST / (scale_base or 1e9)
    assume(bits <= (8 if dtype == torch.float16 else 60))
    q, k = normal(0, 2, n, head_dim, dtype=dtype), normal(1, 2, m, head_dim, dtype=dtype)
    rotated_q, rotated_k = encoding.module(head_dim).rotate(q, k, q_at, k_at, origin)
    assert rotated_q.dtype == rotated_k.dtype == dtype
    error = (rotated_q.double() @ rotated_k.double().mT - scores(q, k, q_at, k_at, encoding)).abs()
    # Rounding the smallest numbers has an absolute error, which no relative bound covers: matters in float16 only.
    subnormal = torch.finfo(dtype).smallest_normal * roundoff(dtype)
    underflow = subnormal * (q.double().norm() + k.double().norm()) * 2**bits
    # 2e-6 in float32; a half rounds each of q and k once; in float64 the oracle rounds, too.
    relative = 2e-6 * 16 * 2**-29 if dtype == torch.float64 else 2e-6 + 2 * roundoff(dtype) * (dtype in HALVES)
    assert (error <= relative * score_sizes(q, k, q_at, k_at, encoding) + underflow).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("scale_base", [0.1, 1, 64, 512, 1e6])
def test_no_factor_within_max_span_overflows(dtype, scale_base):
    xpos = XPOS(8, scale_base)
    span = xpos.max_span(dtype)
    ends = torch.tensor([0, span - 1])
    rotated = torch.cat(xpos.rotate(torch.ones(2, 8), torch.ones(2, 8), ends, ends, origin=span // 2))
    # Pairs (1, 1) have norm sqrt 2; one position of slack since an origin is an integer.
    limit = math.sqrt(2) * 2 ** (4 if dtype == torch.float16 else 32) * (1 + 2e-6)
    assert rotated.abs().max() <= limit
    further = torch.tensor([0, 2 * span + 2])
    rotated = torch.cat(xpos.rotate(torch.ones(2, 8), torch.ones(2, 8), further, further, origin=span + 1))
    assert rotated.unflatten(-1, (-1, 2)).norm(dim=-1).max() > limit  # so the span is not needlessly short


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_autocast_and_earlier_calls_change_no_output(cast):
    x, at = normal(0, 2, 3000, 8), torch.arange(3000)
    fresh, cast_module = XPOS(8), getattr(XPOS(8), cast)()
    for before in DTYPES:
        cast_module(x.to(before), offset=7)
    assert torch.equal(cast_module.scale, fresh.scale)
    expected = fresh(x), *fresh.rotate(x, x, at, at, 1500)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual = cast_module(x), *cast_module.rotate(x, x, at, at, 1500)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_a_state_dict_of_torchscale_loads_whatever_the_default_dtype_and_device_are():
    theirs = torch.nn.Module()
    theirs.register_buffer("scale", (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8))
    for dtype in HALVES:  # as others may have saved it
        xpos = XPOS(8)
        xpos.load_state_dict({"scale": theirs.scale.to(dtype)})
        assert torch.equal(xpos.scale, XPOS(8).scale)
    state = theirs.state_dict()
    assert list(XPOS(8).state_dict()) == list(state)
    torch.set_default_dtype(torch.bfloat16)
    try:
        XPOS(8).load_state_dict(state)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        xpos = XPOS(8)
        xpos.load_state_dict(state, assign=True)
    x = normal(0, 2, 50, 8)
    assert torch.equal(xpos(x), XPOS(8)(x))


@pytest.mark.parametrize("scale", [zeta(8).flip(0), zeta(8) * 1.01, torch.full((4,), math.nan), zeta(16)])
def test_a_wrong_scale_is_refused_and_leaves_ours(scale):
    xpos = XPOS(8)
    said = r"scale must be \(i / \(head_dim/2\) \+ 0.4\) / 1.4 for head_dim=8, got|size mismatch for scale"
    with pytest.raises(RuntimeError, match=said):
        xpos.load_state_dict({"scale": scale})
    assert torch.equal(xpos.scale, XPOS(8).scale)


def original_xpos(x: Tensor, offset: int = 0, downscale: bool = False) -> Tensor:
    """The formula with the exponents of the original: centred on the length."""
    at = torch.arange(x.shape[-2]) + offset
    exponents = at - (x.shape[-2] + offset + 1) // 2
    return encode(x, at, -exponents if downscale else exponents, Encoding(512))


def torchscales_attention(xpos: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of all queries, or of the last alone, as torchscale does it: q is scaled in place, k comes as projected."""
    n, m = q.shape[1], k.shape[1]
    k = xpos(k, offset=0, downscale=True)
    q = xpos(q, offset=m - n, downscale=False)
    q *= 8**-0.5
    hidden = torch.full((n, m), -math.inf, dtype=q.dtype).triu(m - n + 1)
    return (torch.bmm(q, k.mT) + hidden).softmax(-1) @ v


def test_torchscales_attention_trains_and_decodes_alike_with_our_xpos():
    q, k, v = (normal(i, 4, 20, 8, dtype=torch.float64).requires_grad_() for i in range(3))
    output, expected = (torchscales_attention(xpos, q, k, v) for xpos in (XPOS(8), original_xpos))
    upstream = normal(3, *output.shape, dtype=torch.float64)
    results = ([y, *gradients(y, upstream, (q, k, v))] for y in (output, expected))
    assert all(relative_error(ours, theirs) <= SAME for ours, theirs in zip(*results, strict=True))
    for m in range(1, 21):
        decoded = torchscales_attention(XPOS(8), q[:, m - 1 : m], k[:, :m], v[:, :m])
        assert relative_error(decoded, expected[:, m - 1 : m]) <= SAME


def test_numpys_and_torchs_integers_are_integers_too():
    x = normal(0, 2, 5, 8)
    for offset in (torch.tensor(3), torch.tensor([3]), torch.tensor(3, dtype=torch.int32), np.int32(3)):
        assert torch.equal(XPOS(np.int64(8))(x, offset), XPOS(8)(x, 3))  # type: ignore[arg-type]
