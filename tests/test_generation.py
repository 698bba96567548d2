"""`Transformer.generate` and `stream` give what repeated full forwards would; the next token is drawn from logits."""

from itertools import islice
from typing import Any

import pytest
import torch
from builders import PATTERNS, far_apart, model
from hypothesis import given
from hypothesis import strategies as st

from xpos_zoo import Transformer
from xpos_zoo.generation import sample


def language_model(block_size: int | None) -> Transformer:
    return far_apart(model(num_kv_heads=2, block_size=block_size))


prompts = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(1))


@PATTERNS
@pytest.mark.parametrize("lengths", [[11, 11, 11], [11, 1, 7]], ids=["full", "padded"])
def test_greedy_tokens_are_those_of_full_forwards_of_each_prompt_alone(lengths, block_size):
    lm = language_model(block_size)
    padded = {"lengths": torch.tensor(lengths)} if min(lengths) < 11 else {}
    together = lm.generate(prompts, 30, temperature=0, **padded)
    for row, length in enumerate(lengths):
        text = prompts[row : row + 1, :length]
        for _ in range(30):
            text = torch.cat((text, lm(text)[:, -1:].argmax(-1)), 1)
        assert torch.equal(together[row, : length + 30], text[0])
        assert not together[row, length + 30 :].any()


@PATTERNS
def test_a_stream_yields_the_tokens_that_generate_returns(block_size):
    lm = language_model(block_size)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "seed": 5}
    streamed = torch.stack(list(lm.stream(prompts, 20, **options)), 1)
    assert torch.equal(lm.generate(prompts, 20, **options), torch.cat((prompts, streamed), 1))
    assert not torch.equal(lm.generate(prompts, 20, **{**options, "seed": 6}), torch.cat((prompts, streamed), 1))


def test_a_stream_leaves_the_gradient_mode_alone_between_its_tokens():
    for _ in islice(language_model(8).stream(prompts, 5), 3):
        assert torch.is_grad_enabled()


def test_without_a_seed_the_global_generator_goes_on():
    lm = language_model(8)
    torch.manual_seed(3)
    first, second = lm.generate(prompts, 10), lm.generate(prompts, 10)
    torch.manual_seed(3)
    assert torch.equal(lm.generate(prompts, 10), first)
    assert not torch.equal(first, second)


def test_an_ended_row_repeats_eos_and_all_ended_rows_end_the_text():
    lm = language_model(8)
    free = lm.generate(prompts, 30, temperature=0)[:, 11:]
    eos = int(free[0, 4])
    first = [row.tolist().index(eos) if eos in row.tolist() else 30 for row in free]
    given = lm.generate(prompts, 30, temperature=0, eos=eos)[:, 11:]
    assert given.shape[1] == min(30, max(first) + 1)
    for row, end in enumerate(first):
        assert torch.equal(given[row, :end], free[row, : min(end, given.shape[1])])
        assert (given[row, end:] == eos).all()


def test_any_of_several_tokens_ends_a_row_which_repeats_its_own():
    lm = language_model(8)
    free = lm.generate(prompts, 30, temperature=0)[:, 11:]
    ends = sorted({int(row[4]) for row in free})
    given = lm.generate(prompts, 30, temperature=0, eos=ends)[:, 11:]
    for row, expected in zip(given, free, strict=True):
        end = next(i for i, token in enumerate(expected.tolist()) if token in ends)
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end:] == expected[end]).all()


def test_int32_tokens_go_on_as_int64_ones():
    lm = language_model(8)
    narrow = lm.generate(prompts.int(), 10, temperature=0)
    assert narrow.dtype == torch.int32
    assert torch.equal(narrow.long(), lm.generate(prompts, 10, temperature=0))


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
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(20_000, -1)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    expected = torch.tensor(expected)
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert ((torch.bincount(drawn, minlength=4) / 20_000 - expected).abs() <= 5 * deviation).all()


@given(st.floats(1e-30, 1e30), st.floats(-1e30, 1e30))
def test_a_shift_or_an_extreme_temperature_does_not_overflow(temperature, shift):
    logits = torch.tensor([[0.0, 1.0, -1.0]]) + shift
    assert sample(logits, temperature).item() in (0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_drawn_as_float32(dtype):
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    first, second = (sample(t, top_p=0.9, generator=torch.Generator().manual_seed(2)) for t in (logits, logits.float()))
    assert torch.equal(first, second)
