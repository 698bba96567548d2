"""The encodings that xPos is compared with do what their papers say."""

import math

import pytest
import torch
from builders import block, normal
from reference import relative_error, roundoff, theta
from torch import Tensor

from study.encodings import ntk_scaled, yarn
from xpos_zoo import ALiBi, PositionModule, RotaryEmbedding

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [(1, [8]), (4, [2, 4, 6, 8]), (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]), (6, [2, 4, 6, 8, 1, 3])],
)
def test_slopes_are_the_published_ones(heads, exponents):
    """Multiplied by the distance."""
    slopes, alibi = [2.0**-e for e in exponents], ALiBi(heads)
    for distance in (1, 1000):
        bias = alibi(torch.tensor([[distance]])).flatten()
        assert bias.tolist() == pytest.approx([-slope * distance for slope in slopes], rel=4 * roundoff(torch.float32))


def test_alibi_refuses_no_heads():
    with pytest.raises(ValueError, match="num_heads must be above 0 and an integer, got 0"):
        ALiBi(0)


def angles(module: PositionModule) -> Tensor:
    """Of a module that rotates alone."""
    assert all(rate.real == 0 for rate in module.rates)
    return torch.tensor([rate.imag for rate in module.rates], dtype=torch.float64)


def test_stretched_by_one_it_is_plain_rotary():
    rotary = RotaryEmbedding(16, base=500.0, interleaved=False)
    for same in (ntk_scaled(rotary, 1.0), yarn(rotary, 1.0, 128)[0]):
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
    before, after = theta(32), angles(yarn(RotaryEmbedding(32), scale, 1024)[0])
    share = ((1024 * before / (2 * math.pi) - 1) / 31).clamp(0, 1)  # of its own frequency, linear in turns
    assert ((share > 0) & (share < 1)).sum() > 3
    assert share[[0, -1]].tolist() == [1, 0]
    torch.testing.assert_close(after, share * before + (1 - share) * before / scale, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("block_size", [None, 4])
def test_attention_by_yarn_is_that_of_sharpened_queries(block_size):
    (positions, scaling), x = yarn(RotaryEmbedding(8), 4.0, 64), normal(0, 2, 19, 32, dtype=torch.float64)
    options = {"head_dim": 8, "block_size": block_size}
    plain = block(positions=lambda _: PositionModule(positions.rates), **options).double()
    ours = block(positions=lambda _: positions, query_scaling=scaling, **options).double()
    plain.q_proj.weight.data *= (0.1 * math.log(4.0) + 1) ** 2
    assert relative_error(ours(x), plain(x)) <= 100 * EPS
    assert relative_error(plain(x), block(positions=RotaryEmbedding, **options).double()(x)) > 0.01


def test_pairs_without_an_angle_are_not_given_one():
    rotary = RotaryEmbedding(16, max_wavelength=1000)
    for found in (angles(ntk_scaled(rotary, 4.0)), angles(yarn(rotary, 4.0, 64)[0])):
        assert ((found > 0) == (theta(16) >= 2 * math.pi / 1000)).all()
        assert (found == 0).any()
