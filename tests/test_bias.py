"""SoftTail and LogNScaling: their values; what attention does with them is tested where attention is."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import bias_formula, roundoff

from xpos_zoo import LogNScaling, SoftTail


def test_values_are_those_computed_by_hand():
    tail = SoftTail(2.0, 100)(torch.tensor([-7, 0, 1, 99, 100, 200, 1000, 6400]))
    expected = torch.tensor([0, 0, 0, 0, 0, -1.3862944, -4.6051702, -8.3177662])
    assert tail.dtype == torch.float32
    # Seven decimals are given; the quotient, its logarithm and their product are rounded.
    assert (tail - expected).abs().max() <= 5e-8 + 4 * (2 + 9) * roundoff(torch.float32)


@given(
    distance=st.integers(-(2**40), 2**40),
    power=st.sampled_from([0, 0.5, 1, 4.0, 100.0]),
    trained_length=st.integers(1, 2**30),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_values_are_those_of_the_formula_up_to_roundoff(distance, power, trained_length, dtype):
    at = torch.tensor(distance).clamp(-(2**31), 2**31 - 1).to(dtype)
    bias, exact = SoftTail(power, trained_length)(at), bias_formula(SoftTail(power, trained_length))(at)
    # A relative error of the quotient is an absolute one of its logarithm.
    assert (bias - exact).abs() <= 4 * (power + exact.abs()) * roundoff(torch.float32)


def test_the_tail_begins_after_the_trained_length_and_falls_for_ever():
    bias = SoftTail(1.0, 50)(torch.arange(-100, 5000))
    assert (bias[: 100 + 51] == 0).all()
    assert (bias[100 + 51 :].diff() < 0).all()
    assert bias[100 + 51] < 0


def test_weights_of_far_keys_fall_by_the_power_and_so_their_sum_converges():
    """Of equal logits: sum_(m > L) (m/L)^-2 is below L, however many far keys there are."""
    weights = SoftTail(2.0, 64)(torch.arange(1_000_000)).double().exp()
    assert weights[65:].sum() < 64


def test_log_n_factors_are_those_computed_by_hand():
    visible_keys = torch.tensor([1, 100, 200, 1000, 6400])
    expected = torch.tensor([1, 1, 1.0693147, 1.2302585, 1.4158883])  # seven decimals are given
    for dtype in (torch.float32, torch.float64):
        factors = LogNScaling(0.1, 100)(visible_keys, dtype)
        assert factors.dtype == dtype
        # The quotient, its logarithm, their product and sum are rounded.
        assert (factors - expected).abs().max() <= 5e-8 + 4 * roundoff(torch.float32)
