"""The encodings that xPos is compared with do what their papers say."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from einops import rearrange
from reference import theta
from tiny import sharpened
from torch import Tensor

from study.encodings import ALiBi, NoPositions, YaRN, alibi_slopes, ntk_scaled
from xpos_zoo import MultiHeadAttention, PositionModule, RotaryEmbedding

EPS = torch.finfo(torch.float64).eps


def attention(positions: Any, **options: Any) -> MultiHeadAttention:
    torch.manual_seed(0)
    return sharpened(MultiHeadAttention(32, 4, positions=positions, **options), 3.0)


def features(n: int) -> Tensor:
    return torch.randn(2, n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_formula(block: MultiHeadAttention, x: Tensor, slopes: list[float]) -> Tensor:
    """softmax(q k / sqrt(d) - slope * distance) v, causally."""
    projected = (project(x) for project in (block.q_proj, block.k_proj, block.v_proj))
    q, k, v = (rearrange(each, "b n (h d) -> b h n d", h=4) for each in projected)
    at = torch.arange(x.shape[1])
    distance = at[:, None] - at
    logits = q @ k.mT / math.sqrt(block.head_dim) - torch.tensor(slopes).double()[:, None, None] * distance
    weights = logits.masked_fill(distance < 0, -math.inf).softmax(-1)
    return block.out_proj(rearrange(weights @ v, "b h n d -> b n (h d)"))


def assert_same(found: Tensor, expected: Tensor) -> None:
    rounding = 1000 * EPS * float(expected.detach().abs().max())  # sums of some tens of products, through a softmax
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [(1, [8]), (4, [2, 4, 6, 8]), (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]), (6, [2, 4, 6, 8, 1, 3])],
)
def test_slopes_are_the_published_ones(heads, exponents):
    expected = [2.0**-e for e in exponents]
    assert alibi_slopes(heads).tolist() == pytest.approx(expected, rel=4 * torch.finfo(torch.float32).eps)
    with pytest.raises(ValueError, match="num_heads must be above 0 and an integer, got 0"):
        ALiBi(8, num_heads=0)


@pytest.mark.parametrize("block_size", [None, 12])
def test_attention_equals_the_formula(block_size):
    x = features(23)  # two blocks of 12 hide nothing
    for positions, slopes in ((partial(ALiBi, num_heads=4), [2.0**-e for e in (2, 4, 6, 8)]), (NoPositions, [0.0] * 4)):
        block = attention(positions, block_size=block_size)
        assert_same(block(x), by_formula(block, x, slopes))


def angles(module: PositionModule) -> Tensor:
    """Of a module that rotates alone."""
    assert all(rate.real == 0 for rate in module.rates)
    return torch.tensor([rate.imag for rate in module.rates], dtype=torch.float64)


def test_stretched_by_one_it_is_plain_rotary():
    rotary = RotaryEmbedding(16, base=500.0, interleaved=False)
    for same in (ntk_scaled(rotary, 1.0), YaRN(rotary, 1.0, 128)):
        assert not same.interleaved
        torch.testing.assert_close(angles(same), angles(rotary), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("scale", [2.0, 64.0])
def test_ntk_is_another_base_that_slows_the_slowest_pair_by_the_scale(scale):
    before, after = theta(16), angles(ntk_scaled(RotaryEmbedding(16), scale))
    assert after[0] == before[0]
    assert float(before[-1] / after[-1]) == pytest.approx(scale, rel=100 * EPS)
    torch.testing.assert_close(after, theta(16, 10000 * scale ** (16 / 14)), rtol=100 * EPS, atol=0)
    assert ntk_scaled(RotaryEmbedding(2), scale).rates == (1j,)


@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_yarn_leaves_fast_pairs_alone_interpolates_slow_ones_and_mixes_between(scale):
    before, after = theta(32), angles(YaRN(RotaryEmbedding(32), scale, 1024))
    share = ((1024 * before / (2 * math.pi) - 1) / 31).clamp(0, 1)  # of its own frequency, linear in turns
    assert ((share > 0) & (share < 1)).sum() > 3
    assert share[[0, -1]].tolist() == [1, 0]
    torch.testing.assert_close(after, share * before + (1 - share) * before / scale, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("block_size", [None, 4])
def test_attention_by_yarn_is_that_of_sharpened_queries(block_size):
    yarn, x = YaRN(RotaryEmbedding(8), 4.0, 64), features(19)
    plain = attention(lambda _: PositionModule(yarn.rates), block_size=block_size)
    plain.q_proj.weight.data *= (0.1 * math.log(4.0) + 1) ** 2
    assert_same(attention(lambda _: yarn, block_size=block_size)(x), plain(x))


def test_pairs_without_an_angle_are_not_given_one():
    rotary = RotaryEmbedding(16, max_wavelength=1000)
    for found in (angles(ntk_scaled(rotary, 4.0)), angles(YaRN(rotary, 4.0, 64))):
        assert ((found > 0) == (theta(16) >= 2 * math.pi / 1000)).all()
        assert (found == 0).any()
