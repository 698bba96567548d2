"""Blockwise causal attention: all blocks at once, or, where blocks exceed the span of one origin, chunk by chunk.

Axes: b batch, h heads, g key-value heads, n sequence, d head dimension; w is the block size.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    DTYPES,
    HALVES,
    Encoding,
    LargestTensor,
    Sloped,
    assert_attends_exactly,
    attended,
    bias_formula,
    document_ids,
    inputs,
    normal,
    visible,
    within_documents,
)

from xpos_zoo import XPOS, SoftTail, plan

WAYS = pytest.mark.parametrize("scale_base", [64, 0.2], ids=["all blocks at once", "in chunks"])


@given(
    n=st.integers(0, 60),
    w=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    d=st.sampled_from([2, 6, 16]),
    b=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    encoding=st.builds(
        Encoding,
        scale_base=st.sampled_from([None, 0.05, 0.3, 1, 8, 512]),
        base=st.sampled_from([100.0, 10000.0]),
        interleaved=st.booleans(),
        bias=st.none(),
        max_wavelength=st.sampled_from([None, 7.0, 50.0]),
    ),
    tail=st.none() | st.builds(SoftTail, st.sampled_from([0.5, 4.0]), st.integers(1, 30)),
)
def test_attention_equals_the_formula_at_any_size(n, w, heads, d, b, dtype, encoding, tail):
    h, g = heads
    q, k, v = inputs(n, b, h, g, d, dtype)
    actual = attended(q, k, v, encoding.module(d), w, distance_bias=tail)
    if tail is not None:
        encoding = encoding._replace(bias=bias_formula(tail))
    assert_attends_exactly(actual, q, k, v, visible(n, w), encoding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g", [4, 2, 1], ids=["equal heads", "grouped", "multi-query"])
@pytest.mark.parametrize(("n", "w"), [(120, 40), (121, 40), (119, 40), (81, 40), (50, 7), (9, 1)])
@pytest.mark.parametrize(
    "encoding",
    [Encoding(), Encoding(20), Encoding(20, interleaved=False), Encoding(1)],
    ids=["rotary", "xpos", "half-split", "in chunks"],
)
def test_attention_equals_the_formula(encoding, n, w, g, dtype):
    q, k, v = inputs(n, g=g, dtype=dtype)
    actual = attended(q, k, v, encoding.module(8), w)
    assert_attends_exactly(actual, q, k, v, visible(n, w), encoding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_attention_equals_the_formula_around_the_span_of_one_origin(more, dtype):
    encoding = Encoding(0.9)
    w = encoding.module(8).max_span(dtype) + more
    q, k, v = inputs(3 * w + 1, dtype=dtype)
    actual = attended(q, k, v, encoding.module(8), w)
    assert_attends_exactly(actual, q, k, v, visible(3 * w + 1, w), encoding)


@WAYS
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 31, 32])
def test_up_to_two_blocks_are_attended(n, scale_base):
    q, k, v = inputs(n, grad=False)
    xpos = XPOS(8, scale_base)
    assert torch.equal(attended(q, k, v, xpos, 16), attended(q, k, v, xpos))


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 9, 10, 25, 39, 40, 54])
def test_a_token_changes_what_sees_it_and_nothing_else(at, dtype, scale_base):
    n, w = 55, 10
    q, k, v = inputs(n, dtype=dtype, grad=False)
    xpos = XPOS(8, scale_base)
    before = attended(q, k, v, xpos, w)
    for i, t in enumerate((q, k, v)):
        t[..., at, :] = normal(10 + i, *t[..., at, :].shape, dtype=dtype)
    changed = (attended(q, k, v, xpos, w) != before).any(-1).all((0, 1))
    unchanged = (attended(q, k, v, xpos, w) == before).all(-1).all((0, 1))
    assert torch.equal(changed, visible(n, w)[:, at])
    assert torch.equal(unchanged, ~visible(n, w)[:, at])


@WAYS
@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stands_more_than_a_block_before_does_not_matter_nor_how_much(dtype, blocks, scale_base):
    w, xpos = 10, XPOS(8, scale_base)
    q, k, v = inputs((blocks + 4) * w + 3, dtype=dtype, grad=False)
    later = attended(q, k, v, xpos, w)
    q, k, v = (t[..., blocks * w :, :] for t in (q, k, v))
    alone = attended(q, k, v, xpos, w)
    assert torch.equal(later[..., (blocks + 1) * w :, :], alone[..., w:, :])


@WAYS
@pytest.mark.parametrize("positions", [XPOS, Sloped], ids=["no bias", "bias a head"])
def test_no_tensor_grows_faster_than_the_sequence(positions, scale_base):
    def largest(blocks: int) -> int:
        q, k, v = inputs(16 * blocks, b=1)
        with LargestTensor() as seen:
            attended(q, k, v, positions(8, scale_base), 16).sum().backward()
        return seen.numel

    # Twice the blocks after the first are twice the entries.
    assert largest(65) <= 2 * largest(33)


@WAYS
def test_dropout_keeps_the_mean(scale_base):
    q, k, v = (t.expand(500, -1, -1, -1) for t in inputs(30, b=1, h=1, g=1, grad=False))
    torch.manual_seed(0)
    dropped = attended(q, k, torch.ones_like(v), XPOS(8, scale_base), 6, 0.5)
    # Weights that sum to 1 are each doubled or dropped: mean 1, variance sum w^2 <= 1, over 500 samples; 5 sigma.
    assert ((dropped.mean(0) - 1).abs() <= 5 / 500**0.5).all()
    assert (dropped[:, :, 1:].std(0) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_million_positions_are_finite_and_exact_to_the_last(dtype):
    n, w, d, encoding = 1_000_000, 512, 8, Encoding(512)
    q, k, v = inputs(n, b=1, h=1, g=1, d=d, dtype=dtype, grad=False)
    actual = attended(q, k, v, encoding.module(d), w)
    assert actual.isfinite().all()
    tail = n // w * w - 2 * w  # the last three blocks: outputs of the last two need no more
    q, k, v = q[..., tail + w :, :], k[..., tail:, :], v[..., tail:, :]
    assert_attends_exactly(actual[..., tail + w :, :], q, k, v, visible(k.shape[-2], w)[w:], encoding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("scale_base", [512, 0.7], ids=["all blocks at once", "in chunks"])
@pytest.mark.parametrize("g", [4, 1], ids=["equal heads", "multi-query"])
def test_attention_equals_the_formula_on_cuda(g, scale_base, dtype):
    q, k, v = inputs(101, g=g, d=16, dtype=dtype)
    actual = attended(q.cuda(), k.cuda(), v.cuda(), XPOS(16, scale_base), 32).cpu()
    assert_attends_exactly(actual, q, k, v, visible(101, 32), Encoding(scale_base))


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_chunk_size_does_not_matter(chunk, monkeypatch):
    monkeypatch.setattr(plan, "QUERY_CHUNK", chunk)
    q, k, v = inputs(50)
    actual = attended(q, k, v, XPOS(8, 64), 16)
    assert_attends_exactly(actual, q, k, v, visible(50, 16), Encoding(64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 7, 16, 30])
def test_attention_stays_within_documents(block_size, dtype):
    q, k, v = inputs(50, dtype=dtype)
    ids = document_ids(50)
    actual = attended(q, k, v, XPOS(8, 64), block_size, document_ids=ids)
    assert_attends_exactly(actual, q, k, v, within_documents(visible(50, block_size), ids), Encoding(64))


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_a_bias_a_head_is_added_to_the_logits(packed, dtype, scale_base):
    q, k, v = inputs(50, dtype=dtype)
    positions, mask, ids = Sloped(8, scale_base), visible(50, 16), document_ids(50) if packed else None
    actual = attended(q, k, v, positions, 16, document_ids=ids)
    if ids is not None:
        mask = within_documents(mask, ids)
    assert_attends_exactly(actual, q, k, v, mask, Encoding(scale_base, bias=positions.distance_bias))
