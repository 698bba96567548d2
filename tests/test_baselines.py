"""The encodings that xPos is compared with do what their papers say, from a cache, too."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import theta
from tiny import fit, read_checkpoint
from torch import Tensor

from train.baselines import ALiBi, NoPositions, SlidingWindow, YaRN, alibi_slopes, ntk_scaled
from train.language_model import LanguageModel
from xpos_zoo import XPOS, MultiHeadAttention, PositionModule, RotaryEmbedding, Transformer

EPS32, EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


def attention(positions, num_heads: int = 4, **options) -> MultiHeadAttention:
    torch.manual_seed(0)
    block = MultiHeadAttention(8 * num_heads, num_heads, positions=positions, **options).double()
    for parameter in block.parameters():
        parameter.data *= 3  # so that attention is far from uniform
    return block


def features(n: int, num_heads: int = 4, rows: int = 2) -> Tensor:
    return torch.randn(rows, n, 8 * num_heads, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_formula(block: MultiHeadAttention, x: Tensor, slopes: list[float], window: int | None = None) -> Tensor:
    """Attention, one query at a time: softmax(q k / sqrt(d) - slope * distance) v over the last `window` keys."""
    d = block.head_dim
    q, k, v = (project(x) for project in (block.q_proj, block.k_proj, block.v_proj))
    rows = []
    for n in range(x.shape[1]):
        heads = []
        for h, slope in enumerate(slopes):
            part = slice(h * d, (h + 1) * d)
            seen = range(0 if window is None else max(0, n + 1 - window), n + 1)
            logits = torch.stack(
                [(q[:, n, part] * k[:, m, part]).sum(-1) / math.sqrt(d) - slope * (n - m) for m in seen], -1
            )
            heads.append((logits.softmax(-1)[..., None] * v[:, seen.start : n + 1, part]).sum(1))
        rows.append(torch.cat(heads, -1))
    return block.out_proj(torch.stack(rows, 1))


def assert_same(found: Tensor, expected: Tensor) -> None:
    found, expected = found.detach(), expected.detach()
    rounding = 1000 * EPS64 * float(expected.abs().max())  # sums of some tens of products, through a softmax
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


# --- ALiBi -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (4, [2, 4, 6, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (6, [2, 4, 6, 8, 1, 3]),
    ],
)
def test_slopes_are_the_published_ones(heads: int, exponents: list[float]) -> None:
    assert alibi_slopes(heads).tolist() == pytest.approx([2.0**-e for e in exponents], rel=4 * EPS32)


def test_alibi_equals_the_formula() -> None:
    block, x = attention(partial(ALiBi, num_heads=4)), features(23)
    assert_same(block(x), by_formula(block, x, [2.0**-e for e in (2, 4, 6, 8)]))


def test_alibi_in_blocks_that_hide_nothing_equals_the_formula() -> None:
    block, x = attention(partial(ALiBi, num_heads=4), block_size=4), features(8)
    assert_same(block(x), by_formula(block, x, [2.0**-e for e in (2, 4, 6, 8)]))


@pytest.mark.parametrize("positions", [partial(ALiBi, num_heads=4), NoPositions])
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("chunk", [1, 5])
def test_a_baseline_from_a_cache_equals_the_full_forward(positions, block_size: int | None, chunk: int) -> None:
    block, x = attention(positions, block_size=block_size), features(19)
    cache = block.make_cache(2, 19)
    assert_same(torch.cat([block(part, cache) for part in x.split(chunk, 1)], 1), block(x))


@pytest.mark.parametrize("heads", [2, 6])
def test_the_language_model_tells_alibi_its_heads(heads: int) -> None:
    options: Any = {"positions": ALiBi, "embed_dim": 8 * heads, "num_heads": heads, "num_kv_heads": 2}
    model = LanguageModel(16, num_layers=2, **options).transformer
    positions: Any = [attention.positions for attention in model.attentions]
    assert [each.num_heads for each in positions] == [heads, heads]
    assert model(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 256)


def test_a_number_of_heads_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads must be above 0 and an integer, got 0"):
        ALiBi(8, num_heads=0)


# --- no positions ----------------------------------------------------------------------------------------------------


def test_without_positions_one_layer_does_not_know_the_order_of_the_past() -> None:
    x = features(13)
    order = torch.cat((torch.randperm(12, generator=torch.Generator().manual_seed(2)), torch.tensor([12])))
    for positions, knows in ((NoPositions, False), (ALiBi, True), (XPOS, True)):
        block = attention(positions)
        if isinstance(block.positions, ALiBi):
            block.positions.num_heads = 4
        last, again = block(x)[:, -1], block(x[:, order])[:, -1]
        if knows:
            assert (last - again).abs().max() > 1e-3
        else:
            assert_same(again, last)


def test_without_positions_attention_equals_the_formula() -> None:
    block, x = attention(NoPositions), features(11)
    assert_same(block(x), by_formula(block, x, [0.0] * 4))


# --- a sliding window ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_sliding_window_is_attention_to_the_last_keys_alone(size: int) -> None:
    block, x = attention(NoPositions), features(17)
    block.distance_bias = SlidingWindow(size)
    assert_same(block(x), by_formula(block, x, [0.0] * 4, window=size))


def test_a_sliding_window_from_a_cache_equals_the_full_forward() -> None:
    block, x = attention(RotaryEmbedding), features(19)
    block.distance_bias = SlidingWindow(6)
    cache = block.make_cache(2, 19)
    assert_same(torch.cat([block(part, cache) for part in x.split(1, 1)], 1), block(x))


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_window_without_a_size_is_refused(size) -> None:
    with pytest.raises(ValueError, match="size must be above 0 and an integer"):
        SlidingWindow(size)


# --- rotary embedding, stretched -------------------------------------------------------------------------------------


def turned(module: PositionModule, n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 2, n, 2 * len(module.rates), dtype=torch.float64, generator=generator)
    at = torch.arange(n)
    return module.rotate(q, k, at, at, n // 2)


def angles(module: PositionModule) -> Tensor:
    """Of a module that rotates alone."""
    assert all(rate.real == 0 for rate in module.rates)
    return torch.tensor([rate.imag for rate in module.rates], dtype=torch.float64)


@pytest.mark.parametrize("interleaved", [True, False])
def test_stretched_by_one_it_is_plain_rotary(interleaved: bool) -> None:
    rotary = RotaryEmbedding(16, base=500.0, interleaved=interleaved)
    for same in (ntk_scaled(rotary, 1.0), YaRN(rotary, 1.0, 128)):
        for found, expected in zip(turned(same), turned(rotary), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1000 * EPS64)  # angles up to 25, each to an eps


@pytest.mark.parametrize("scale", [2.0, 8.0, 64.0])
def test_ntk_leaves_the_fastest_pair_alone_and_slows_the_slowest_by_the_scale(scale: float) -> None:
    before, after = theta(16), angles(ntk_scaled(RotaryEmbedding(16), scale))
    assert after[0] == before[0]
    assert float(before[-1] / after[-1]) == pytest.approx(scale, rel=100 * EPS64)
    assert (before[1:-1] > after[1:-1]).all()
    torch.testing.assert_close(after, theta(16, 10000 * scale ** (16 / 14)), rtol=100 * EPS64, atol=0)  # another base
    assert ntk_scaled(RotaryEmbedding(2), scale).rates == (1j,)


@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_yarn_leaves_fast_pairs_alone_interpolates_slow_ones_and_mixes_between(scale: float) -> None:
    trained_length = 1024
    before, after = theta(32), angles(YaRN(RotaryEmbedding(32), scale, trained_length))
    turns = trained_length * before / (2 * math.pi)
    fast, slow = turns >= 32, turns <= 1
    assert fast[0]
    assert slow[-1]
    torch.testing.assert_close(after[fast], before[fast], rtol=4 * EPS64, atol=0)
    torch.testing.assert_close(after[slow], before[slow] / scale, rtol=4 * EPS64, atol=0)
    between = ~fast & ~slow
    assert between.sum() > 3
    share = (turns[between] - 1) / 31  # linear in turns, from none to all of the own frequency
    expected = share * before[between] + (1 - share) * before[between] / scale
    torch.testing.assert_close(after[between], expected, rtol=4 * EPS64, atol=0)


def test_yarn_sharpens_scores_by_the_temperature() -> None:
    scale = 4.0
    q, k = torch.ones(2, 1, 1, 1, 8, dtype=torch.float64)
    at = torch.zeros(1, dtype=torch.int64)
    (q_turned, k_turned), expected = YaRN(RotaryEmbedding(8), scale, 64).rotate(q, k, at, at), q @ k.mT
    found = float((q_turned @ k_turned.mT) / expected)
    assert found == pytest.approx((0.1 * math.log(scale) + 1) ** 2, rel=4 * EPS64)


@pytest.mark.parametrize("block_size", [None, 4])
def test_attention_by_yarn_is_that_of_sharpened_queries(block_size: int | None) -> None:
    yarn, x = YaRN(RotaryEmbedding(8), 4.0, 64), features(19)
    sharpened = attention(lambda _: yarn, block_size=block_size)
    plain = attention(lambda _: PositionModule(yarn.rates), block_size=block_size)
    plain.q_proj.weight.data *= (0.1 * math.log(4.0) + 1) ** 2
    assert_same(sharpened(x), plain(x))


@pytest.mark.parametrize("stretched", [partial(ntk_scaled, scale=4.0), partial(YaRN, scale=4.0, trained_length=8)])
@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("chunk", [1, 7])
def test_stretched_in_a_trained_model_a_cache_still_equals_the_full_forward(
    stretched, block_size: int | None, chunk: int
) -> None:
    torch.manual_seed(0)
    model = Transformer(11, 32, 2, 2, positions=RotaryEmbedding, block_size=block_size).double()
    tokens = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(4))
    before = model(tokens)
    for each in model.attentions:
        assert isinstance(each.positions, RotaryEmbedding)
        each.positions = stretched(each.positions)
    whole = model(tokens)
    assert (whole - before).abs().max() > 1e-6
    cache = model.make_cache(2, 30)
    assert_same(torch.cat([model(part, cache) for part in tokens.split(chunk, 1)], 1), whole)


@pytest.mark.parametrize("stretched", [ntk_scaled, partial(YaRN, trained_length=64)])
def test_pairs_without_an_angle_are_not_given_one(stretched) -> None:
    found = angles(stretched(RotaryEmbedding(16, max_wavelength=1000), scale=4.0))
    assert (found > 0).tolist() == [2 * math.pi * 10000 ** (i / 8) <= 1000 for i in range(8)]
    assert (found == 0).any()


@pytest.mark.parametrize("stretched", [ntk_scaled, partial(YaRN, trained_length=64)])
def test_what_cannot_be_stretched_is_refused(stretched) -> None:
    with pytest.raises(ValueError, match=r"scale must be 1 or above and finite, got 0\.5"):
        stretched(RotaryEmbedding(8), scale=0.5)
    with pytest.raises(ValueError, match="rotary must be a RotaryEmbedding, which alone can be stretched, got XPOS"):
        stretched(XPOS(8), scale=2.0)


# --- from YAML -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "name"), [("alibi", "ALiBi"), ("none", "NoPositions")])
def test_a_shipped_configuration_trains_its_encoding(config: str, name: str, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(fit(tmp_path, config))
    assert checkpoint["hyper_parameters"]["positions"]["class_path"].endswith(name)
    assert checkpoint["hyper_parameters"]["scale_base"] is None


@pytest.mark.parametrize("config", ["alibi", "none"])
def test_configurations_of_baselines_differ_from_rotary_in_one_word(config: str) -> None:
    configs = Path(__file__).parents[1] / "configs"
    words = [(configs / f"{name}.yaml").read_text().split() for name in (config, "rotary")]
    assert sum(a != b for a, b in zip(*words, strict=True)) == 1
