"""Dense causal attention, from one origin or, beyond its span, chunk by chunk.

Axes: b batch, h heads, g key-value heads, n sequence, d head dimension.
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
    relative_error,
    visible,
    within_documents,
)

from xpos_zoo import XPOS, SoftTail, plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g", [4, 2, 1], ids=["equal heads", "grouped", "multi-query"])
@pytest.mark.parametrize(
    ("encoding", "n"),
    [
        (Encoding(), 77),
        (Encoding(512), 77),
        (Encoding(512, interleaved=False), 40),
        (Encoding(3), 101),  # in chunks in float16
        (Encoding(0.7), 101),  # in chunks in every dtype
        (Encoding(0.01), 20),  # one query at a time
    ],
)
def test_attention_equals_the_formula(encoding, n, g, dtype):
    q, k, v = inputs(n, g=g, dtype=dtype)
    actual = attended(q, k, v, encoding.module(8))
    assert_attends_exactly(actual, q, k, v, visible(n), encoding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_attention_equals_the_formula_around_the_span_of_one_origin(more, dtype):
    encoding = Encoding(0.9)
    n = encoding.module(8).max_span(dtype) + more
    q, k, v = inputs(n, dtype=dtype)
    assert_attends_exactly(attended(q, k, v, encoding.module(8)), q, k, v, visible(n), encoding)


@given(
    n=st.integers(0, 40),
    scale_base=st.sampled_from([None, 0.05, 0.3, 1, 8, 512]),
    max_wavelength=st.sampled_from([None, 7.0, 50.0]),
    d=st.sampled_from([2, 6, 16]),
    b=st.integers(0, 2),
)
def test_attention_equals_the_formula_at_any_size(n, scale_base, max_wavelength, d, b):
    q, k, v = inputs(n, b=b, d=d)
    encoding = Encoding(scale_base, max_wavelength=max_wavelength)
    assert_attends_exactly(attended(q, k, v, encoding.module(d)), q, k, v, visible(n), encoding)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_chunk_size_does_not_matter(chunk, monkeypatch):
    monkeypatch.setattr(plan, "QUERY_CHUNK", chunk)
    q, k, v = inputs(50)
    assert XPOS(8, 0.7).max_span(q.dtype) < 50
    assert_attends_exactly(attended(q, k, v, XPOS(8, 0.7)), q, k, v, visible(50), Encoding(0.7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("scale_base", [64, 0.7])
def test_attention_stays_within_documents(scale_base, chunk, dtype, monkeypatch):
    monkeypatch.setattr(plan, "QUERY_CHUNK", chunk)
    q, k, v = inputs(50, dtype=dtype)
    ids = document_ids(50)
    actual = attended(q, k, v, XPOS(8, scale_base), document_ids=ids)
    assert_attends_exactly(actual, q, k, v, within_documents(visible(50), ids), Encoding(scale_base))


def test_a_packed_document_attends_as_it_would_alone():
    q, k, v = inputs(50, grad=False)
    packed = attended(q, k, v, XPOS(8, 64), document_ids=torch.arange(50).expand(2, -1) // 17)
    documents = zip(*(t.split(17, dim=-2) for t in (q, k, v)), strict=True)
    alone = [attended(q, k, v, XPOS(8, 64)) for q, k, v in documents]
    assert relative_error(packed, torch.cat(alone, -2)) <= 1e-5


@given(
    n=st.integers(0, 40),
    scale_base=st.sampled_from([None, 0.3, 8, 512]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    b=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    tail=st.builds(SoftTail, st.sampled_from([0.0, 0.5, 2, 8.0]), st.integers(1, 45)),
)
def test_a_soft_tail_is_added_to_the_logits(n, scale_base, heads, b, dtype, tail):
    q, k, v = inputs(n, b, *heads, dtype=dtype)
    encoding = Encoding(scale_base)
    actual = attended(q, k, v, encoding.module(8), distance_bias=tail)
    assert_attends_exactly(actual, q, k, v, visible(n), encoding._replace(bias=bias_formula(tail)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("scale_base", [64, 0.7])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_a_bias_a_head_is_added_to_the_logits(packed, scale_base, chunk, dtype, monkeypatch):
    monkeypatch.setattr(plan, "QUERY_CHUNK", chunk)
    q, k, v = inputs(50, dtype=dtype)
    positions, mask, ids = Sloped(8, scale_base), visible(50), document_ids(50) if packed else None
    actual = attended(q, k, v, positions, document_ids=ids)
    if ids is not None:
        mask = within_documents(mask, ids)
    assert_attends_exactly(actual, q, k, v, mask, Encoding(scale_base, bias=positions.distance_bias))


def test_the_biases_of_a_position_module_and_another_add_up():
    q, k, v = inputs(50)
    positions, tail = Sloped(8, 64), SoftTail(3.0, 10)
    actual = attended(q, k, v, positions, distance_bias=tail)

    def total(distance: torch.Tensor) -> torch.Tensor:
        return positions.distance_bias(distance) + bias_formula(tail)(distance)

    assert_attends_exactly(actual, q, k, v, visible(50), Encoding(64, bias=total))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [torch.nan, torch.inf])
def test_a_bias_of_minus_infinity_hides_a_key_and_one_of_a_hidden_key_does_not_count(hidden, dtype):
    def window(distance: torch.Tensor) -> torch.Tensor:
        bias = torch.where(distance < 10, 0.0, -torch.inf)
        return torch.where(distance < 0, hidden, bias)

    q, k, v = inputs(50, dtype=dtype)
    actual = attended(q, k, v, XPOS(8, 64), distance_bias=window)
    assert_attends_exactly(actual, q, k, v, visible(50) & ~visible(50).tril(-10), Encoding(64))


def test_with_a_bias_no_tensor_grows_faster_than_the_sequence(monkeypatch):
    monkeypatch.setattr(plan, "QUERY_CHUNK", 16)

    def largest(n: int) -> int:
        q, k, v = inputs(n, b=1)
        with LargestTensor() as seen:
            attended(q, k, v, Sloped(8)).sum().backward()
        return seen.numel

    assert largest(512) <= 2 * largest(256)


@pytest.mark.parametrize("scale_base", [512, 0.7], ids=["one origin", "in chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("factor", [1, 30])
def test_the_future_changes_nothing(scale_base, dtype, factor):
    n, at = 60, 31
    q, k, v = inputs(n, dtype=dtype, grad=False)
    before = attended(q, k, v, XPOS(8, scale_base))
    for i, t in enumerate((q, k, v)):
        t[..., at:, :] = factor * normal(10 + i, *t[..., at:, :].shape, dtype=dtype)
    after = attended(q, k, v, XPOS(8, scale_base))
    assert torch.equal(after[..., :at, :], before[..., :at, :])
    assert ((after != before)[..., at:, :]).any(-1).all()


@pytest.mark.parametrize("scale_base", [512, 1])
def test_the_past_counts(scale_base):
    q, k, v = inputs(60, grad=False)
    before = attended(q, k, v, XPOS(8, scale_base))
    v[..., 3, :] += 1
    assert (attended(q, k, v, XPOS(8, scale_base)) != before)[..., 3:, :].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_hidden_future_scores_of_large_inputs_do_not_overflow(dtype):
    """At exactly the longest sequence of one origin, where the factors of hidden scores are largest."""
    encoding = Encoding(2)
    n = encoding.module(8).max_span(dtype)
    large = [8, 8, 1] if dtype == torch.float16 else [1000, 0.001, 1]
    q, k, v = ((t.detach() * s).requires_grad_() for t, s in zip(inputs(n, dtype=dtype), large, strict=True))
    assert_attends_exactly(attended(q, k, v, encoding.module(8)), q, k, v, visible(n), encoding)


def test_dropout_is_that_of_plain_attention_in_the_mean():
    q, k, v = inputs(20, b=1, h=1, g=1, grad=False)
    v = torch.ones_like(v)
    torch.manual_seed(0)
    dropped = attended(
        q.expand(500, -1, -1, -1), k.expand(500, -1, -1, -1), v.expand(500, -1, -1, -1), XPOS(8), dropout_p=0.5
    )
    # Weights that sum to 1 are each doubled or dropped: mean 1, variance sum w^2 <= 1, over 500 samples; 5 sigma.
    assert ((dropped.mean(0) - 1).abs() <= 5 / 500**0.5).all()
    assert (dropped[:, :, 1:].std(0) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_hundred_thousand_tokens_are_finite_and_exact(dtype):
    n, encoding = 100_000, Encoding(512)
    q, k, v = inputs(n, b=1, h=1, g=1, dtype=dtype, grad=False)
    actual = attended(q, k, v, encoding.module(8))
    assert actual.isfinite().all()
    for i in (0, 1023, 1024, 8849, 18_133, n // 2, n - 1):
        row, before = slice(i, i + 1), slice(0, i + 1)
        mask = torch.ones(1, i + 1, dtype=torch.bool)
        assert_attends_exactly(
            actual[..., row, :], q[..., row, :], k[..., before, :], v[..., before, :], mask, encoding
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("scale_base", [512, 0.7], ids=["one origin", "in chunks"])
def test_attention_equals_the_formula_on_cuda(scale_base, dtype):
    q, k, v = inputs(101, d=16, dtype=dtype)
    actual = attended(q.cuda(), k.cuda(), v.cuda(), XPOS(16, scale_base)).cpu()
    assert_attends_exactly(actual, q, k, v, visible(101), Encoding(scale_base))


@pytest.mark.gpu
def test_what_a_mask_hides_stays_hidden_on_cuda_however_large_it_is():
    """Scores of the future reach 5e5 here, far above what a backend may put for minus infinity."""
    n, encoding = 600, Encoding(64)
    q, k, v = inputs(n, b=1, d=32, dtype=torch.bfloat16, grad=False)
    ids = torch.zeros(1, n, dtype=torch.int64, device="cuda")
    actual = attended(q.cuda(), k.cuda(), v.cuda(), XPOS(32, 64), document_ids=ids).cpu()
    assert_attends_exactly(actual, q, k, v, visible(n), encoding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("g", [4, 1], ids=["equal heads", "multi-query"])
def test_a_bias_is_added_to_the_logits_on_cuda(g, dtype):
    """One that halves can hold, for there it is rounded to them."""
    q, k, v = inputs(101, g=g, d=16, dtype=dtype)
    positions = Sloped(16, 64)
    actual = attended(q.cuda(), k.cuda(), v.cuda(), positions.cuda()).cpu()
    assert_attends_exactly(actual, q, k, v, visible(101), Encoding(64, bias=positions.distance_bias))
