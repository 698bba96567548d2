"""The encodings that xPos is compared with do what their papers say, from a cache, too."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from reference import theta
from tiny import sharpened
from torch import Tensor

from study.encodings import ALiBi, NoPositions, YaRN, alibi_slopes, ntk_scaled
from xpos_zoo import XPOS, MultiHeadAttention, PositionModule, RotaryEmbedding, Transformer

EPS32, EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


def attention(positions: Any, num_heads: int = 4, **options: Any) -> MultiHeadAttention:
    torch.manual_seed(0)
    return sharpened(MultiHeadAttention(8 * num_heads, num_heads, positions=positions, **options), 3.0)


def features(n: int, num_heads: int = 4, rows: int = 2) -> Tensor:
    return torch.randn(rows, n, 8 * num_heads, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_formula(block: MultiHeadAttention, x: Tensor, slopes: list[float]) -> Tensor:
    """Attention, one query at a time: softmax(q k / sqrt(d) - slope * distance) v."""
    d = block.head_dim
    q, k, v = (project(x) for project in (block.q_proj, block.k_proj, block.v_proj))
    rows = []
    for n in range(x.shape[1]):
        heads = []
        for h, slope in enumerate(slopes):
            part = slice(h * d, (h + 1) * d)
            logits = torch.stack(
                [(q[:, n, part] * k[:, m, part]).sum(-1) / math.sqrt(d) - slope * (n - m) for m in range(n + 1)], -1
            )
            heads.append((logits.softmax(-1)[..., None] * v[:, : n + 1, part]).sum(1))
        rows.append(torch.cat(heads, -1))
    return block.out_proj(torch.stack(rows, 1))


def assert_same(found: Tensor, expected: Tensor) -> None:
    found, expected = found.detach(), expected.detach()
    rounding = 1000 * EPS64 * float(expected.abs().max())  # sums of some tens of products, through a softmax
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


# --- ALiBi and no positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [(1, [8]), (4, [2, 4, 6, 8]), (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]), (6, [2, 4, 6, 8, 1, 3])],
)
def test_slopes_are_the_published_ones(heads: int, exponents: list[float]) -> None:
    assert alibi_slopes(heads).tolist() == pytest.approx([2.0**-e for e in exponents], rel=4 * EPS32)


@pytest.mark.parametrize("block_size", [None, 12])
def test_attention_equals_the_formula(block_size: int | None) -> None:
    x = features(23)  # two blocks of 12 hide nothing
    for positions, slopes in ((partial(ALiBi, num_heads=4), [2.0**-e for e in (2, 4, 6, 8)]), (NoPositions, [0.0] * 4)):
        block = attention(positions, block_size=block_size)
        assert_same(block(x), by_formula(block, x, slopes))


def test_without_positions_one_layer_does_not_know_the_order_of_the_past() -> None:
    x = features(13)
    order = torch.cat((torch.randperm(12, generator=torch.Generator().manual_seed(2)), torch.tensor([12])))
    for positions, knows in ((NoPositions, False), (partial(ALiBi, num_heads=4), True), (XPOS, True)):
        block = attention(positions)
        last, again = block(x)[:, -1], block(x[:, order])[:, -1]
        if knows:
            assert (last - again).abs().max() > 1e-3
        else:
            assert_same(again, last)


def test_a_number_of_heads_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads must be above 0 and an integer, got 0"):
        ALiBi(8, num_heads=0)


# --- rotary embedding, stretched -------------------------------------------------------------------------------------


def angles(module: PositionModule) -> Tensor:
    """Of a module that rotates alone."""
    assert all(rate.real == 0 for rate in module.rates)
    return torch.tensor([rate.imag for rate in module.rates], dtype=torch.float64)


@pytest.mark.parametrize("interleaved", [True, False])
def test_stretched_by_one_it_is_plain_rotary(interleaved: bool) -> None:
    rotary = RotaryEmbedding(16, base=500.0, interleaved=interleaved)
    for same in (ntk_scaled(rotary, 1.0), YaRN(rotary, 1.0, 128)):
        assert same.interleaved == interleaved
        torch.testing.assert_close(angles(same), angles(rotary), rtol=4 * EPS64, atol=0)


@pytest.mark.parametrize("scale", [2.0, 64.0])
def test_ntk_leaves_the_fastest_pair_alone_and_slows_the_slowest_by_the_scale(scale: float) -> None:
    before, after = theta(16), angles(ntk_scaled(RotaryEmbedding(16), scale))
    assert after[0] == before[0]
    assert float(before[-1] / after[-1]) == pytest.approx(scale, rel=100 * EPS64)
    torch.testing.assert_close(after, theta(16, 10000 * scale ** (16 / 14)), rtol=100 * EPS64, atol=0)  # another base
    assert ntk_scaled(RotaryEmbedding(2), scale).rates == (1j,)


@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_yarn_leaves_fast_pairs_alone_interpolates_slow_ones_and_mixes_between(scale: float) -> None:
    trained_length = 1024
    before, after = theta(32), angles(YaRN(RotaryEmbedding(32), scale, trained_length))
    turns = trained_length * before / (2 * math.pi)
    share = ((turns - 1) / 31).clamp(0, 1)  # of its own frequency, linear in turns
    assert ((share > 0) & (share < 1)).sum() > 3
    assert share[0] == 1
    assert share[-1] == 0
    torch.testing.assert_close(after, share * before + (1 - share) * before / scale, rtol=4 * EPS64, atol=0)


@pytest.mark.parametrize("block_size", [None, 4])
def test_attention_by_yarn_is_that_of_sharpened_queries(block_size: int | None) -> None:
    yarn, x = YaRN(RotaryEmbedding(8), 4.0, 64), features(19)
    sharp = attention(lambda _: yarn, block_size=block_size)
    plain = attention(lambda _: PositionModule(yarn.rates), block_size=block_size)
    plain.q_proj.weight.data *= (0.1 * math.log(4.0) + 1) ** 2
    assert_same(sharp(x), plain(x))


def test_pairs_without_an_angle_are_not_given_one() -> None:
    rotary = RotaryEmbedding(16, max_wavelength=1000)
    for found in (angles(ntk_scaled(rotary, 4.0)), angles(YaRN(rotary, 4.0, 64))):
        assert ((found > 0) == (theta(16) >= 2 * math.pi / 1000)).all()
        assert (found == 0).any()


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize(
    "positions",
    [
        partial(ALiBi, num_heads=4),
        NoPositions,
        lambda head_dim: ntk_scaled(RotaryEmbedding(head_dim), 4.0),
        lambda head_dim: YaRN(RotaryEmbedding(head_dim), 4.0, 8),
    ],
)
def test_a_cache_gives_the_full_forward(positions: Any, block_size: int | None) -> None:
    torch.manual_seed(0)
    model = sharpened(Transformer(11, 32, 2, 4, positions=positions, block_size=block_size), 1.0)
    tokens = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(4))
    for chunk in (1, 7):
        cache = model.make_cache(2, 30)
        assert_same(torch.cat([model(part, cache) for part in tokens.split(chunk, 1)], 1), model(tokens))
