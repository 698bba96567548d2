"""Attention from a cache: the same numbers as one full forward, however the sequence comes.

Axes: b batch, h heads, g key-value heads, n sequence, d head dimension.
"""

import copy
import io
import random
from functools import partial
from unittest import mock

import pytest
import torch
from builders import DTYPES, HALVES, PATTERNS, attending, block, double, locality, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    Encoding,
    assert_attends_exactly,
    difference,
    encodings,
    multi_head_attention,
    relative_error,
    roundoff,
    sloped,
    tails,
    visible,
)
from torch import Tensor

from xpos_zoo import XPOS, KeyValueCache, LogNScaling, MultiHeadAttention, SoftTail

CONTRACT = 1e-5  # relative to the full forward, in float32


def in_pieces(module: MultiHeadAttention, x: Tensor, cache: KeyValueCache, sizes: list[int]) -> Tensor:
    """Outputs (b, h, n, d) of x that comes in pieces of these sizes."""
    outputs = [module(piece, cache=cache) for piece in x.split(sizes, dim=1)]
    return torch.cat(outputs, dim=1).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def decoder(block_size: int | None = None, **options) -> MultiHeadAttention:
    return block(positions=partial(XPOS, scale_base=16), block_size=block_size, **options).requires_grad_(False)


@settings(max_examples=100)
@given(
    sizes=st.lists(st.one_of(st.just(1), st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=8),
    local=locality(None, 1, 2, 5, 16, 40),
    encoding=encodings,
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dtype=st.sampled_from(DTYPES),
    tail=st.none() | tails,
    b=st.sampled_from([0, 2, 2]),
)
def test_pieces_of_any_size_attend_by_the_formula(sizes, local, encoding, heads, dtype, tail, b):
    n, (h, g) = sum(sizes), heads
    q, k, v = (normal(i, b, count, n, 6, dtype=dtype) for i, count in enumerate((h, g, g)))
    module, x = attending(q, k, v, encoding.module(6), tail, **local)
    actual = in_pieces(module, x, module.make_cache(b, max(n, 1), dtype=dtype), sizes)
    assert_attends_exactly(actual, q, k, v, visible(n, **local), encoding.with_biases(tail))


@given(
    steps=st.lists(st.sampled_from(["tokens", "tokens", "select", "crop", "reset", "reload"]), min_size=2, max_size=9),
    local=locality(None, 1, 8, 11),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    options=st.sampled_from(
        [
            {"num_kv_heads": 1},
            {"num_kv_heads": 2, "qk_norm": True, "output_gate": True},
            {"distance_bias": SoftTail(2, 5), "query_scaling": LogNScaling(0.5, 10)},
            {"distance_bias": sloped},
        ]
    ),
    seed=st.integers(0, 2**16),
)
@mock.patch("xpos_zoo.cache.FIRST_SLOTS", 16)
def test_rows_of_different_lengths_decode_as_each_does_alone(steps, local, dtype, options, seed):
    """Whatever else is done to their cache, which grows as needed."""
    module, draw = decoder(**local, **options).to(dtype), random.Random(seed)
    exactly, cache, seen = double(module), module.make_cache(2), [torch.empty(0, 32, dtype=dtype)] * 2  # by each row
    for i, step in enumerate(steps):
        spoilt = torch.full((len(seen), 3, 32), torch.nan, dtype=dtype)
        if step == "select":
            rows, before = [draw.randrange(len(seen)) for _ in range(draw.randint(1, 4))], cache
            cache, seen = cache.select(torch.tensor(rows)), [seen[row] for row in rows]
            module(spoilt, cache=before)
        elif step == "crop" and set(local.values()) == {None}:
            lengths = [draw.randint(0, 40) for _ in seen]
            cache.crop(torch.tensor(lengths))
            seen = [x[:length] for x, length in zip(seen, lengths, strict=True)]
        elif step == "reset":
            module(spoilt, cache=cache)
            cache.reset()
            seen = [x[:0] for x in seen]
        elif step == "reload" and cache.max_length in (None, 16):
            torch.save(cache.state_dict(), file := io.BytesIO())
            file.seek(0)
            cache = module.make_cache(len(seen))
            cache.load_state_dict(torch.load(file, weights_only=True))
        n = draw.choice([0, 1, 1, 5, 20])
        x, counts = normal(i, len(seen), n, 32, dtype=dtype), [draw.choice([0, n // 2, n]) for _ in seen]
        seen = [torch.cat((old, new[:count])) for old, new, count in zip(seen, x, counts, strict=True)]
        for row, count in enumerate(counts):
            x[row, count:] = torch.nan  # padding must not count
        output = module(x, cache=cache, lengths=None if set(counts) == {n} else torch.tensor(counts))
        assert cache.length.tolist() == [len(x) for x in seen]
        for alone, count, ours in zip(seen, counts, output, strict=True):
            full, exact = module(alone[None])[0], exactly(alone.double()[None])[0]
            # The cache's keys may be rounded more often.
            allowed = 2 * difference(full, exact) + 2 * roundoff(dtype) * exact.norm()
            assert difference(ours[:count], exact[len(exact) - count :]) <= allowed


@pytest.mark.parametrize("start", [999_936, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_blockwise_decode_is_as_exact_at_token_one_million_as_at_the_first(start, dtype):
    w = 64
    q, k, v = (normal(i, 1, 2, 3 * w, 16, dtype=dtype) for i in range(3))
    module, x = attending(q, k, v, XPOS(16, w), block_size=w)
    cache = module.make_cache(1, dtype=dtype)
    cache.length += start
    assert start % w == 0
    actual = in_pieces(module, x, cache, [30] + [1] * (3 * w - 30))
    # What came before `start` is in sight of the first block alone.
    rest, mask = slice(w, None), visible(3 * w, w)
    assert_attends_exactly(actual[..., rest, :], q[..., rest, :], k, v, mask[rest], Encoding(w))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dense_decode_at_131072_keys_attends_by_the_formula(dtype):
    n, encoding = 131_072, Encoding(64)
    positions = encoding.module(8)
    q, k, v = normal(0, 1, 2, 1, 8, dtype=dtype), *(normal(i, 1, 1, n, 8, dtype=dtype) for i in (1, 2))
    module, x = attending(q, k[..., -1:, :], v[..., -1:, :], positions)
    cache = module.make_cache(1, n, dtype=dtype)
    at, old = torch.arange(n - 1), k[..., :-1, :]
    cache[0].k[..., : n - 1, :] = positions.rotate(old, old, at, at, at - at % cache[0].segment_length)[1]
    cache[0].v[..., : n - 1, :] = v[..., :-1, :]
    cache.length += n - 1
    actual = in_pieces(module, x, cache, [1])
    assert_attends_exactly(actual, q, k, v, torch.ones(1, n, dtype=torch.bool), encoding)


@pytest.mark.parametrize("block_size", [None, 64], ids=["dense", "blockwise"])
@pytest.mark.parametrize("size", [30, 300])
def test_large_keys_do_not_overflow_in_float16(block_size, size):
    """Also those that are hidden, late in their part and behind a chunk of queries."""
    n, encoding = 1100, Encoding(64)
    q, k, v = (normal(i, 1, 1, n, 8, dtype=torch.float16) * s for i, s in enumerate((1 / size, size, 1)))
    module, x = attending(q, k, v, encoding.module(8), block_size=block_size)
    actual = in_pieces(module, x, module.make_cache(1, n, dtype=torch.float16), [1000, 1, 99])
    rows = slice(-100, None)
    assert actual.isfinite().all()
    mask = visible(n, block_size)[rows]
    assert_attends_exactly(actual[..., rows, :], q[..., rows, :], k, v, mask, encoding)


@PATTERNS
def test_a_state_goes_over_to_bfloat16_but_not_to_float16_or_other_positions(block_size):
    """Float16's segments are shorter, for its factors must be smaller."""
    module = decoder(block_size and 4 * block_size)
    cache = module.make_cache(2, 40)
    x, more = normal(0, 2, 20, 32), normal(1, 2, 5, 32)
    module(x, cache=cache)
    bfloat16 = copy.deepcopy(module).bfloat16()
    other = bfloat16.make_cache(2, 40)
    other.load_state_dict(cache.state_dict())
    expected = module(more, cache=copy.deepcopy(cache))
    for loaded in (other, copy.deepcopy(cache).bfloat16()):
        # Weights, inputs, keys, and what is computed from them are rounded.
        assert relative_error(bfloat16(more.bfloat16(), cache=loaded), expected) <= 8 * roundoff(torch.bfloat16)
        assert loaded.length.dtype == torch.int64
    half = copy.deepcopy(module).half()
    with pytest.raises(ValueError, match=r"cache does not match this layer: needs segment_length=\d+, was made with"):
        half(more.half(), cache=copy.deepcopy(cache).half())
    module.positions = XPOS(8, 0.5)
    for changed in (half, module):
        with pytest.raises(ValueError, match=r"state_dict does not match this cache: .* needs .*'segment_length': \d+"):
            changed.make_cache(2, 40).load_state_dict(cache.state_dict())


def test_a_cache_made_under_autocast_has_its_dtype_and_nothing_a_gradient():
    module, x = decoder(8, qk_norm=True).requires_grad_(), normal(0, 2, 30, 32)
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


@PATTERNS
def test_a_state_dict_of_more_tokens_loads_into_a_new_cache_that_grows(block_size):
    module, x = decoder(block_size), normal(0, 2, 310, 32)
    cache, fresh = module.make_cache(2), module.make_cache(2)
    expected = module(x)[:, 300:]
    module(x[:, :300], cache=cache)
    fresh.load_state_dict(cache.state_dict())
    assert relative_error(module(x[:, 300:], cache=fresh), expected) <= CONTRACT
    others = decoder(16), block(positions=partial(XPOS, scale_base=3), block_size=block_size)
    for other in (module.make_cache(3), *(each.make_cache(2) for each in others)):
        with pytest.raises(ValueError, match="state_dict"):
            fresh.load_state_dict(other.state_dict())
        assert fresh.length.tolist() == [310, 310]


@PATTERNS
def test_a_cache_serves_inference_mode_and_no_grad_in_turn(block_size):
    module, x = decoder(block_size), normal(0, 2, 700, 32)
    expected, outputs = module(x), []
    with torch.inference_mode():
        cache = module.make_cache(2)
    for i, piece in enumerate(x.split(100, dim=1)):
        with torch.inference_mode(i % 2 == 0):
            outputs.append(module(piece, cache=cache).clone())
            cache = cache.select(torch.arange(2)) if i == 3 else cache
    assert relative_error(torch.cat(outputs, dim=1), expected) <= CONTRACT
