"""The documented functions, and RotaryEmbedding.

Axes: b batch, h heads, n sequence, m keys, d head dimension.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import DTYPES, HALVES, normal
from hypothesis import given
from hypothesis import strategies as st
from reference import Encoding, channels, encode, pairs, relative_error, roundoff, theta

from xpos_zoo import PositionModule, apply_rotary_pos_emb, duplicate_interleave, fixed_pos_embedding, rotate_every_two

LEADING = ((), (2,), (1, 2, 3))
TABLE = 1.1e-7  # of float32 tables: an angle up to pi/4, a polynomial and its last sum are each rounded


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
def test_tables_are_the_sine_and_cosine_rounded_once(dtype):
    sin, cos = fixed_pos_embedding(torch.empty(700, 6).to(dtype))
    dtype = torch.float32 if dtype == torch.int64 else dtype
    frequency = torch.tensor([10000 ** (-j / 6) for j in range(6)], dtype=torch.float64)
    angle = torch.arange(700).double()[:, None] * frequency
    assert sin.dtype == cos.dtype == dtype
    # One rounding of a number up to 1; some of float64 in an angle up to 700, or what float32 computes with.
    tolerance = roundoff(dtype) + (700 * 4 * roundoff(torch.float64) if dtype == torch.float64 else TABLE)
    assert (sin.double() - angle.sin()).abs().max() <= tolerance
    assert (cos.double() - angle.cos()).abs().max() <= tolerance


@pytest.mark.parametrize("leading", LEADING)
def test_every_pair_turns_by_a_quarter(leading):
    x = normal(0, *leading, 5, 6)
    assert torch.equal(rotate_every_two(x), channels(1j * pairs(x)).float())


def test_each_column_comes_twice_side_by_side_whatever_the_strides():
    whole = normal(0, 2, 6, 8)
    for m in (whole, whole[0, 0], whole.transpose(0, 2), whole[:, ::2, 1::3], whole[0, 0].expand(3, 8), whole[..., :0]):
        doubled = duplicate_interleave(m)
        assert doubled.shape == (*m.shape[:-1], 2 * m.shape[-1])
        assert torch.equal(doubled[..., 0::2], m)
        assert torch.equal(doubled[..., 1::2], m)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("wide", [False, True])
def test_pairs_are_rotated_by_the_tables_and_scaled_by_a_factor_of_any_width(wide, leading):
    n, d = 5, 8
    x, factor = normal(0, *leading, n, d, dtype=torch.float64), 0.1 + normal(1, n, d // 2, dtype=torch.float64).abs()
    angle = torch.arange(n).double()[:, None] * theta(d)
    sin, cos = (duplicate_interleave(t) if wide else t for t in (angle.sin(), angle.cos()))
    doubled = duplicate_interleave(factor)
    for scale in (1, 0.3, factor[0, 0], factor[:1, :1], factor[:, :1], factor[0], factor, doubled):
        expected = channels(pairs(x) * torch.exp(1j * angle) * (factor if scale is doubled else scale))
        # Table and product are rounded once, the sum's terms and the sum too.
        assert relative_error(apply_rotary_pos_emb(x, sin, cos, scale), expected) <= 4 * roundoff(torch.float64)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_input_with_float32_tables_is_rounded_once(dtype):
    x = normal(0, 2, 5, 8, dtype=dtype)
    output = apply_rotary_pos_emb(x, *fixed_pos_embedding(torch.empty(5, 8)))
    assert output.dtype == dtype
    expected = encode(x, torch.arange(5), None, Encoding())
    assert relative_error(output, expected) <= roundoff(dtype) + 3 * roundoff(torch.float32)


@given(
    rates=st.lists(st.builds(complex, st.floats(-0.2, 0), st.floats(-4, 4)), min_size=1, max_size=5)
    | st.just([0j, -0.05 + 0j, 1e-9j]),
    start=st.sampled_from([0, 123_456, 2**30]),
    interleaved=st.booleans(),
)
def test_scores_are_those_of_any_rates(rates, start, interleaved):
    q, k, at = normal(0, 2, 9, 2 * len(rates)), normal(1, 2, 9, 2 * len(rates)), torch.arange(9)
    rotated_q, rotated_k = PositionModule(rates, interleaved).rotate(q, k, at + start, at + start, origin=start + 4)
    growth = torch.exp((at[:, None] - at)[..., None] * torch.tensor(rates, dtype=torch.complex128))
    terms = pairs(q, interleaved)[:, :, None] * pairs(k, interleaved).conj()[:, None] * growth
    error = (rotated_q.double() @ rotated_k.double().mT - terms.real.sum(-1)).abs()
    assert (error <= 2e-6 * terms.abs().sum(-1)).all()


def test_the_module_of_the_contributing_page_has_its_rates():
    names: dict[str, Any] = {}
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], names)
    module, x = names["TwoScales"](8), torch.ones(1, 101, 8)
    at = torch.arange(101)
    q, k = module.rotate(x, x, at, at[:1])
    scores = (q @ k.mT)[0, :, 0]
    # Two pairs turn, two decay; each contributes |1 + 1j|^2 at distance 0.
    assert scores[[0, 4, 8, 100]].tolist() == pytest.approx([8, -0.1087, 7.784, -2], abs=0.01)
