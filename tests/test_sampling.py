"""Drawing the next token from logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xpos_zoo.sampling import sample

probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])


def frequencies(draws: int = 20_000, **options) -> torch.Tensor:
    logits = probabilities.log().expand(draws, -1)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=4) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3}, [0.5, 0.25, 0.125, 0.125]),  # a tie is not broken
        ({"top_k": 99}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # of the two left, the first has 2/3
        ({"temperature": 0}, [1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(options, expected):
    expected = torch.tensor(expected)
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert ((frequencies(**options) - expected).abs() <= 5 * deviation).all()


@given(st.floats(1e-30, 1e30), st.floats(-1e30, 1e30))
def test_a_shift_or_an_extreme_temperature_does_not_overflow(temperature, shift):
    logits = torch.tensor([[0.0, 1.0, -1.0]]) + shift
    assert sample(logits, temperature).item() in (0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_drawn_as_float32(dtype):
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    first, second = (sample(t, top_p=0.9, generator=torch.Generator().manual_seed(2)) for t in (logits, logits.float()))
    assert torch.equal(first, second)
