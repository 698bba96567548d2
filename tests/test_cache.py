"""Attention from a cache: the same numbers as one full forward, however the sequence comes.

Axes: b batch, h heads, g key-value heads, n sequence, d head dimension.
"""

import copy
import io
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    DTYPES,
    HALVES,
    PATTERNS,
    Encoding,
    Sloped,
    assert_attends_exactly,
    block,
    double,
    multi_head_attention,
    normal,
    relative_error,
    roundoff,
    visible,
)
from torch import Tensor

from xpos_zoo import XPOS, KeyValueCache, LogNScaling, MultiHeadAttention, PositionModule, ScaleInvariant, SoftTail
from xpos_zoo.attend import attend
from xpos_zoo.plan import Pattern, Tokens, make_plan

CONTRACT = 1e-5  # relative to the full forward, in float32
splits = st.lists(st.one_of(st.just(1), st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=8)


def one_layer(b: int, g: int, positions: PositionModule, block_size: int | None, most: int, dtype: torch.dtype):
    """An empty cache for `in_pieces`."""
    width = 2 * len(positions.rates)
    attention = MultiHeadAttention(g * width, g, positions=lambda head_dim: positions, block_size=block_size)
    return attention.make_cache(b, most, dtype=dtype)


def in_pieces(
    q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache, sizes: list[int], positions: PositionModule, bias=None
) -> Tensor:
    """Attention of q (b, h, n, d) on k, v (b, g, n, d) that come in pieces of these sizes, from a cache."""
    outputs = []
    for new_q, new_k, new_v in zip(*(t.transpose(1, 2).split(sizes, dim=1) for t in (q, k, v)), strict=True):
        b, n = new_q.shape[:2]
        tokens = Tokens(b, n, q.dtype, q.device, length=cache.length, most=cache.admit(n, None))
        pattern = Pattern(positions, cache[0].block_size, None, bias)
        plan = make_plan(pattern, tokens, cache[0])
        outputs.append(attend(new_q, new_k, new_v, plan, pattern, cache[0]))
        cache.advance()
    return torch.cat(outputs, dim=1).transpose(1, 2)


def decoder(block_size: int | None = None, positions: type[XPOS] = XPOS, **options) -> MultiHeadAttention:
    positions_16 = partial(positions, scale_base=16)
    return block(positions=positions_16, block_size=block_size, **options).requires_grad_(False)


@settings(max_examples=100)
@given(
    sizes=splits,
    block_size=st.sampled_from([None, None, 1, 2, 5, 16, 40]),
    scale_base=st.sampled_from([None, 0.05, 0.7, 3, 64, 512]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    max_wavelength=st.sampled_from([None, None, 7.0, 50.0]),
    tail=st.none() | st.builds(SoftTail, st.just(4.0), st.integers(1, 50)) | st.just(ScaleInvariant(3.0)),
    b=st.sampled_from([0, 2, 2]),
)
def test_any_pieces_attend_by_the_formula(
    sizes, block_size, scale_base, heads, dtype, interleaved, max_wavelength, tail, b
):
    n, (h, g) = sum(sizes), heads
    q, k, v = (normal(i, b, count, n, 6, dtype=dtype) for i, count in enumerate((h, g, g)))
    encoding = Encoding(scale_base, interleaved=interleaved, max_wavelength=max_wavelength)
    positions = encoding.module(6)
    cache = one_layer(b, g, positions, block_size, max(n, 1), dtype)
    actual = in_pieces(q, k, v, cache, sizes, positions, tail)
    assert_attends_exactly(actual, q, k, v, visible(n, block_size), encoding.with_biases(tail))


@PATTERNS
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 1},
        {"positions": Sloped, "distance_bias": SoftTail(2, 5), "query_scaling": LogNScaling(0.5, 10)},
    ],
)
def test_rows_of_different_length_go_on_as_each_would_alone(options, block_size, dtype):
    """Prompts padded on the right, then chunks of which each row takes another part, then single tokens."""
    module = decoder(block_size, **options).to(dtype)
    x = normal(0, 4, 70, 32, dtype=dtype)
    pieces = [(30, [30, 1, 17, 0]), (9, [2, 9, 0, 9]), *[(1, [1, 1, 1, 1])] * 12, (1, [0, 0, 0, 0]), (1, [1, 0, 1, 0])]
    pieces.append((6, [6, 5, 1, 3]))
    cache = module.make_cache(4, 70)
    seen, outputs = [0] * 4, [[] for _ in range(4)]
    for n, counts in pieces:
        piece = torch.full((4, n, 32), torch.nan, dtype=dtype)  # what is padding must not count
        for row, count in enumerate(counts):
            piece[row, :count] = x[row, seen[row] : seen[row] + count]
        output = module(piece, cache=cache, lengths=torch.tensor(counts))
        for row, count in enumerate(counts):
            outputs[row].append(output[row, :count])
            seen[row] += count
    assert cache.length.tolist() == seen
    for row in range(4):
        alone = x[row : row + 1, : seen[row]]
        full, exact = module(alone), multi_head_attention(double(module), alone.double())
        allowed = 2 * relative_error(full, exact) + 2 * roundoff(dtype)  # the cache's keys may be rounded more often
        assert relative_error(torch.cat(outputs[row])[None], exact) <= allowed


@pytest.mark.parametrize("start", [999_936, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_blockwise_decode_is_as_exact_at_token_one_million_as_at_the_first(start, dtype):
    w = 64
    q, k, v = (normal(i, 1, 2, 3 * w, 16, dtype=dtype) for i in range(3))
    positions = XPOS(16, w)
    cache = one_layer(1, 2, positions, w, 1, dtype)
    cache.length += start
    assert start % w == 0
    actual = in_pieces(q, k, v, cache, [30] + [1] * (3 * w - 30), positions)
    # What came before `start` is in sight of the first block alone.
    rest, mask = slice(w, None), visible(3 * w, w)
    assert_attends_exactly(actual[..., rest, :], q[..., rest, :], k, v, mask[rest], Encoding(w))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dense_decode_at_131072_keys_attends_by_the_formula(dtype):
    n, encoding = 131_072, Encoding(64)
    positions = encoding.module(8)
    q, k, v = normal(0, 1, 2, 1, 8, dtype=dtype), *(normal(i, 1, 1, n, 8, dtype=dtype) for i in (1, 2))
    cache = one_layer(1, 1, positions, None, n, dtype)
    at = torch.arange(n - 1) % cache[0].part_size
    cache[0].k[..., : n - 1, :] = positions.rotate(q, k[..., :-1, :], at[:1], at)[1]
    cache[0].v[..., : n - 1, :] = v[..., :-1, :]
    cache.length += n - 1
    actual = in_pieces(q, k[..., -1:, :], v[..., -1:, :], cache, [1], positions)
    assert_attends_exactly(actual, q, k, v, torch.ones(1, n, dtype=torch.bool), encoding)


@pytest.mark.parametrize("block_size", [None, 64], ids=["dense", "blockwise"])
@pytest.mark.parametrize("size", [30, 300])
def test_large_keys_do_not_overflow_in_float16(block_size, size):
    """Also those that are hidden, late in their part and behind a chunk of queries."""
    n, encoding = 1100, Encoding(64)
    positions = encoding.module(8)
    q, k, v = (normal(i, 1, 1, n, 8, dtype=torch.float16) * s for i, s in enumerate((1 / size, size, 1)))
    cache = one_layer(1, 1, positions, block_size, n, torch.float16)
    actual = in_pieces(q, k, v, cache, [1000, 1, 99], positions)
    rows = slice(-100, None)
    assert actual.isfinite().all()
    mask = visible(n, block_size)[rows]
    assert_attends_exactly(actual[..., rows, :], q[..., rows, :], k, v, mask, encoding)


@PATTERNS
def test_selected_rows_go_on_apart_from_the_rows_they_come_from(block_size):
    module = decoder(block_size)
    x, more = normal(0, 3, 20, 32), normal(1, 4, 9, 32)
    cache = module.make_cache(3, 40)
    module(x, cache=cache)
    rows = torch.tensor([2, 0, 0, 1])
    forked = cache.select(rows)
    expected = module(torch.cat((x[rows], more), 1))[:, 20:]
    assert relative_error(module(more, cache=forked), expected) <= CONTRACT
    assert cache.length.tolist() == [20] * 3
    assert relative_error(module(more[:3], cache=cache), module(torch.cat((x, more[:3]), 1))[:, 20:]) <= CONTRACT


@PATTERNS
def test_a_reset_cache_is_as_a_fresh_one_even_after_nan(block_size):
    module = decoder(block_size)
    cache, fresh = (module.make_cache(2, 40) for _ in range(2))
    module(normal(1, 2, 37, 32) * torch.nan, cache=cache)
    cache.reset()
    for piece in normal(0, 2, 40, 32).split([11, 1, 28], dim=1):
        assert torch.equal(module(piece, cache=cache), module(piece, cache=fresh))


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5), scale_base=st.sampled_from([2, 16, 512]))
def test_a_cache_without_a_length_grows_with_what_comes(sizes, scale_base):
    module = decoder()
    module.positions = XPOS(8, scale_base)
    cache, x = module.make_cache(2), normal(0, 2, sum(sizes), 32)
    pieces = [module(piece, cache=cache) for piece in x.split(sizes, dim=1)]
    assert relative_error(torch.cat(pieces, 1), module(x)) <= CONTRACT


@given(keep=st.tuples(st.integers(0, 30), st.integers(0, 30)), more=st.integers(1, 20))
def test_a_cropped_cache_goes_on_from_where_each_row_was_cut(keep, more):
    module, x, new = decoder(), normal(0, 2, 30, 32), normal(1, 2, more, 32)
    cache = module.make_cache(2, 50)
    module(x, cache=cache)
    cache.crop(torch.tensor(keep))
    output = module(new, cache=cache)
    for row, kept in enumerate(keep):
        alone = module(torch.cat((x[row, :kept], new[row]))[None])[0, kept:]
        assert relative_error(output[row], alone) <= CONTRACT
    cache.crop(0)
    assert not cache.length.any()


def test_a_cache_is_saved_loaded_and_copied_like_a_module():
    module = decoder(8)
    cache, loaded = module.make_cache(2), module.make_cache(2)
    x, more = normal(0, 2, 20, 32), normal(1, 2, 5, 32)
    module(x, cache=cache)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(cache)
    expected = module(more, cache=cache)
    assert torch.equal(module(more, cache=loaded), expected)
    assert torch.equal(module(more, cache=copied), expected)
    assert cache.to(torch.bfloat16).length.dtype == torch.int64


@PATTERNS
def test_a_state_goes_over_to_another_dtype_but_not_to_other_positions(block_size):
    module = decoder(block_size)
    cache = module.make_cache(2, 40)
    x, more = normal(0, 2, 20, 32), normal(1, 2, 5, 32)
    module(x, cache=cache)
    half = copy.deepcopy(module).half()
    other = half.make_cache(2, 40)
    other.load_state_dict(cache.state_dict())
    expected = module(more, cache=copy.deepcopy(cache))
    for loaded in (other, copy.deepcopy(cache).half()):
        # Weights, inputs, keys, and what is computed from them are rounded to a half.
        assert relative_error(half(more.half(), cache=loaded), expected) <= 8 * roundoff(torch.float16)
    module.positions = XPOS(8, 0.5)
    with pytest.raises(ValueError, match=r"state_dict must be of a cache with .*'part_size': 1.*'part_size': \d+"):
        module.make_cache(2, 40).load_state_dict(cache.state_dict())


def test_a_cache_made_under_autocast_has_its_dtype_and_nothing_a_gradient():
    module, x = decoder(8).requires_grad_(), normal(0, 2, 30, 32)
    with torch.autocast("cpu", torch.bfloat16):
        cache = module.make_cache(2)
        actual = torch.cat([module(piece, cache=cache) for piece in x.split([20, 1, 9], dim=1)], 1)
        full = module(x)
    assert cache[0].k.dtype == torch.bfloat16
    exact = multi_head_attention(double(module), x.double())
    assert relative_error(actual, exact) <= 2 * relative_error(full, exact)
    assert full.requires_grad
    assert not actual.requires_grad


def test_a_refused_call_leaves_the_cache_as_it_was():
    module, x = decoder(), torch.zeros(2, 5, 32)
    cache = module.make_cache(2, 7)
    module(x[:, :3], cache=cache)
    before = copy.deepcopy(cache.state_dict())
    with pytest.raises(ValueError, match="cache must have room for 5 more tokens, got max_length=7, of which 3 are"):
        module(x, cache=cache)
    assert all(torch.equal(before[name], kept) for name, kept in cache.named_buffers())
    module(x[:, :4], cache=cache)  # which exactly fits


@pytest.mark.gpu
@PATTERNS
def test_decode_runs_in_a_cuda_graph(block_size, compiler_counts):
    module = decoder(block_size).cuda()
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    x, cache = normal(0, 2, 60, 32).cuda(), module.make_cache(2, 60)
    with torch.no_grad():
        outputs = [module(x[:, :20], cache=cache)]
        for i in range(20, 60):
            torch.compiler.cudagraph_mark_step_begin()
            outputs.append(compiled(x[:, i : i + 1], cache=cache).clone())
    assert not compiler_counts["inductor"]["cudagraph_skips"]
    assert relative_error(torch.cat(outputs, 1), module(x)) <= CONTRACT
