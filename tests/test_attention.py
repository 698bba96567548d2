"""Attention without a cache: dense and blockwise, from one origin and in chunks, as a function and as a block.

Axes: b batch, h heads, g key-value heads, n sequence, d head dimension; w is the block size.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from builders import (
    DTYPES,
    HALVES,
    PATTERNS,
    LearnedBias,
    Operations,
    attended,
    block,
    document_ids,
    inputs,
    locality,
    normal,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import (
    Encoding,
    assert_attends_exactly,
    assert_block_is_exact,
    encodings,
    relative_error,
    roundoff,
    sloped,
    tails,
    visible,
)
from torch import nn

from xpos_zoo import XPOS, ALiBi, LogNScaling, ScalableSoftmax, ScaleInvariant, SoftTail, blockwise, dense


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=10)
@given(
    n=st.integers(2, 60),
    local=locality(None, 2, 5, 20),
    heads=st.sampled_from([(4, 4), (4, 2)]),
    dtype=st.sampled_from((torch.float32, *HALVES)),
    encoding=encodings,
    bias=tails | st.builds(LearnedBias),
    documents=st.booleans(),
    chunk=st.sampled_from([25, 1024]),
)
def test_flex_attention_gets_the_same_mask_and_gain(n, local, heads, dtype, encoding, bias, documents, chunk):
    """As far as a CPU can tell: there FlexAttention computes plainly, and has no gradient."""
    h, g = heads
    q, k, v = inputs(n, 2, h, g, 6, dtype, grad=False)
    settings = {"document_ids": document_ids(n) if documents else None, "bias": bias} | local
    outputs = []
    for way in (lambda settings, n, *_: n > 1, lambda *_: False):
        with (
            torch.no_grad(),
            mock.patch.object(dense, "MASK_CHUNK", chunk),
            mock.patch.object(dense, "use_flex", way),
            mock.patch.object(blockwise, "use_flex", way),
        ):
            outputs.append(attended(q, k, v, encoding.module(6), **settings))
    assert relative_error(*outputs) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_attention_equals_the_formula_around_the_span_of_one_origin(more, dtype):
    """Where factors of hidden future scores are largest; also of inputs that are large themselves."""
    encoding = Encoding(0.9)
    span = encoding.module(8).max_span(dtype) + more
    for n, w in ((span, None), (3 * span + 1, span), (2 * span, span // 2)):
        for sizes in ((1, 1, 1), (8, 8, 1) if dtype == torch.float16 else (1000, 0.001, 1)):
            q, k, v = ((t.detach() * s).requires_grad_() for t, s in zip(inputs(n, dtype=dtype), sizes, strict=True))
            assert_attends_exactly(attended(q, k, v, encoding.module(8), w), q, k, v, visible(n, w), encoding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [torch.nan, torch.inf])
def test_a_bias_of_minus_infinity_hides_a_key_and_one_of_a_hidden_key_does_not_count(hidden, dtype):
    def window(distance: torch.Tensor) -> torch.Tensor:
        bias = torch.where(distance < 10, 0.0, -torch.inf)
        return torch.where(distance < 0, hidden, bias)

    q, k, v = inputs(50, dtype=dtype)
    actual = attended(q, k, v, XPOS(8, 64), bias=window)
    assert_attends_exactly(actual, q, k, v, visible(50) & ~visible(50).tril(-10), Encoding(64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_million_positions_in_blocks_are_finite_and_exact_to_the_last(dtype):
    n, w, d, encoding = 1_000_000, 512, 8, Encoding(512)
    q, k, v = inputs(n, b=1, h=1, g=1, d=d, dtype=dtype, grad=False)
    actual = attended(q, k, v, encoding.module(d), w)
    assert actual.isfinite().all()
    tail = n // w * w - 2 * w  # the last three blocks: outputs of the last two need no more
    q, k, v = q[..., tail + w :, :], k[..., tail:, :], v[..., tail:, :]
    assert_attends_exactly(actual[..., tail + w :, :], q, k, v, visible(k.shape[-2], w)[w:], encoding)


@given(
    at=st.integers(0, 54),
    local=locality(None, 1, 2, 7, 16, 30),
    dtype=st.sampled_from(DTYPES),
    scale_base=st.sampled_from([64, 0.2]),
    factor=st.sampled_from([1, 30]),
)
def test_a_token_changes_what_sees_it_and_nothing_else_to_the_last_bit(at, local, dtype, scale_base, factor):
    q, k, v = inputs(55, dtype=dtype, grad=False)
    xpos = XPOS(8, scale_base)
    before = attended(q, k, v, xpos, **local)
    for i, t in enumerate((q, k, v)):
        t[..., at, :] = factor * normal(10 + i, *t[..., at, :].shape, dtype=dtype)
    after = attended(q, k, v, xpos, **local)
    sees = visible(55, **local)[:, at]
    assert torch.equal(after[..., ~sees, :], before[..., ~sees, :])
    if scale_base == 64 and factor == 1 and dtype != torch.bfloat16:  # else weights may be too small to count
        assert (after != before)[..., sees, :].any(-1).all()


@pytest.mark.parametrize(
    ("bias", "scale_base", "w"), [(None, 0.2, None), (sloped, 64, None), (sloped, 64, 16), (sloped, 0.2, 16)]
)
def test_no_tensor_grows_faster_than_the_sequence(bias, scale_base, w, monkeypatch):
    monkeypatch.setattr(dense, "MASK_CHUNK", 16)

    def largest(blocks: int) -> int:
        q, k, v = inputs(16 * blocks, b=1)
        with Operations() as seen:
            attended(q, k, v, XPOS(8, scale_base), w, bias=bias).sum().backward()
        return seen.largest

    assert largest(33) <= 2 * largest(17)  # twice the blocks after the first are twice the entries


@pytest.mark.parametrize("scale_base", [64, 0.2], ids=["one origin", "in chunks"])
@pytest.mark.parametrize("w", [None, 6], ids=["dense", "blockwise"])
def test_dropout_keeps_the_mean(w, scale_base):
    q, k, v = (t.expand(500, -1, -1, -1) for t in inputs(30, b=1, h=1, g=1, grad=False))
    torch.manual_seed(0)
    dropped = attended(q, k, torch.ones_like(v), XPOS(8, scale_base), w, dropout=0.5)
    # Weights that sum to 1 are each doubled or dropped: mean 1, variance sum w^2 <= 1, over 500 samples; 5 sigma.
    assert ((dropped.mean(0) - 1).abs() <= 5 / 500**0.5).all()
    assert (dropped[:, :, 1:].std(0) > 0).all()


@pytest.mark.slow
@settings(max_examples=150)
@given(
    n=st.integers(0, 60),
    b=st.integers(0, 2),
    num_kv_heads=st.sampled_from([4, 2, 1]),
    head_dim=st.sampled_from([2, 6, 16]),
    bias=st.booleans(),
    qk_norm=st.booleans(),
    positions=encodings.map(lambda encoding: encoding.module),
    output_gate=st.booleans(),
    local=locality(None, 1, 2, 5, 12, 20),
    query_scaling=st.none()
    | st.builds(LogNScaling, st.sampled_from([0.1, 1.0]), st.integers(1, 20))
    | st.builds(ScalableSoftmax, st.integers(1, 20)),
    distance_bias=st.none() | tails | st.just(sloped) | st.builds(LearnedBias),
    documents=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    autocast=st.sampled_from([None, None, *HALVES]),
    chunk=st.sampled_from([1, 7, 1024]),
)
def test_the_block_equals_the_formula(
    n, b, local, query_scaling, distance_bias, documents, dtype, autocast, chunk, **options
):
    assume(b * n > 0 or not isinstance(distance_bias, LearnedBias))  # whose parameters nothing then depends on
    ids = document_ids(n) if documents and b == 2 and n else None
    module = block(13, query_scaling=query_scaling, distance_bias=distance_bias, **local, **options).to(dtype)
    autocast = autocast if dtype == torch.float32 else None
    with mock.patch.object(dense, "MASK_CHUNK", chunk), mock.patch.object(dense, "GAIN_CHUNK", chunk):
        assert_block_is_exact(module, normal(0, b, n, 13, dtype=dtype), autocast=autocast, document_ids=ids)


def test_the_formula_on_the_page_of_how_it_works_is_what_a_block_computes():
    names: dict[str, Any] = {}
    page = (Path(__file__).parents[1] / "docs" / "how_it_works.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], names)
    xpos = XPOS(8, 4)
    rates = torch.tensor(xpos.rates, dtype=torch.complex128)
    q, k, v = (normal(i, 50, 8, dtype=torch.float64) for i in range(3))
    ours = attended(q[None, None], k[None, None], v[None, None], xpos)
    assert relative_error(ours[0, 0], names["attention"](q, k, v, rates.imag, rates.real)) <= 1000 * roundoff(
        torch.float64
    )


def test_dropout_acts_in_training_alone():
    x = normal(0, 2, 40, 32)
    without, module = block()(x), block(dropout=0.5)
    assert torch.equal(module.eval()(x), without)
    assert relative_error(module.train()(x), without) > 0.1


@PATTERNS
def test_log_n_scaling_is_exactly_off_for_queries_within_the_trained_length(block_size):
    module, x = block(block_size=block_size), normal(0, 2, 40, 32)
    off = module(x)
    module.query_scaling = LogNScaling(0.5, 10)
    on = module(x)
    beyond = visible(40, block_size).sum(-1) > 10
    assert torch.equal(on[:, ~beyond], off[:, ~beyond])
    assert (on != off)[:, beyond].any(-1).all()


def test_a_discount_changes_no_bit_of_a_training_at_its_length():
    """So that one on a trained model is one that it was trained with."""
    found = []
    for bias in (ScaleInvariant(3.0), ScaleInvariant(3.0, discount=2.0, trained_length=24)):
        module, x = block(distance_bias=bias), normal(0, 2, 25, 32)
        module(x[:, :24]).square().sum().backward()
        found.append((module(x), module.q_proj.weight.grad))
    (plain, plain_grad), (discounted, grad) = found
    assert torch.equal(grad, plain_grad)
    assert torch.equal(discounted[:, :24], plain[:, :24])
    assert not torch.equal(discounted[:, 24], plain[:, 24])


def test_biases_by_distance_are_float32_whatever_the_default():
    distance, default = torch.arange(30)[None, None, None], torch.get_default_dtype()
    for bias in (SoftTail(0.7, 5), ScaleInvariant(3.0), ScaleInvariant(3.0, 2.3, 5)):
        expected = bias(distance)
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                torch.testing.assert_close(bias(distance), expected, rtol=0, atol=0)
            finally:
                torch.set_default_dtype(default)


def test_a_bias_may_be_a_function_a_module_or_none_in_any_order():
    module, learned = block(), LearnedBias()
    for bias in (SoftTail(1.0, 5), learned, SoftTail(2.0, 5), None, learned, None, lambda distance: -distance):
        module.set_attention(distance_bias=bias)
        assert module.distance_bias is bias
        assert ("distance_bias.table" in module.state_dict()) == (bias is learned)
        assert (learned.table in set(module.parameters())) == (bias is learned)


def test_a_refused_setting_leaves_the_old_one():
    module = block(block_size=12)
    for name, value in (("block_size", 0), ("query_scaling", 0.2), ("distance_bias", 2), ("positions", nn.Identity())):
        before = getattr(module, name)
        with pytest.raises(ValueError, match=f"{name} must"):
            module.set_attention(**{name: value})
        assert getattr(module, name) is before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("positions", [XPOS, partial(XPOS, scale_base=0.2)], ids=["xpos", "in chunks"])
@pytest.mark.parametrize(
    "bias", [None, SoftTail(2, 10), ScaleInvariant(), ALiBi(4)], ids=["plain", "tail", "gain", "alibi"]
)
@PATTERNS
def test_the_block_equals_the_formula_on_cuda(positions, bias, block_size, dtype):
    """Where there is a bias, by FlexAttention."""
    module = block(64, distance_bias=bias, num_kv_heads=1, block_size=block_size, positions=positions).to(dtype)
    assert_block_is_exact(module, normal(0, 2, 41, 64, dtype=dtype), device="cuda")


@pytest.mark.gpu
def test_what_a_mask_hides_stays_hidden_on_cuda_however_large_it_is():
    """Scores of the future reach 5e5 here, far above what a backend may put for minus infinity."""
    n, encoding = 600, Encoding(64)
    q, k, v = inputs(n, b=1, d=32, dtype=torch.bfloat16, grad=False)
    ids = torch.zeros(1, n, dtype=torch.int64, device="cuda")
    actual = attended(q.cuda(), k.cuda(), v.cuda(), XPOS(32, 64), document_ids=ids).cpu()
    assert_attends_exactly(actual, q, k, v, visible(n), encoding)
