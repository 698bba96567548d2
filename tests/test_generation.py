"""`Transformer.generate` and `stream`: what repeated full forwards would give."""

from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from xpos_zoo import XPOS, Transformer


def language_model(block_size: int | None) -> Transformer:
    """With large random weights, so that logits are far apart and every token counts."""
    torch.manual_seed(0)
    model = Transformer(50, 32, 2, 4, num_kv_heads=2, positions=partial(XPOS, scale_base=8), block_size=block_size)
    for parameter in model.parameters():
        parameter.data *= 6
    return model.eval().requires_grad_(False)


def continued(model: Transformer, tokens: Tensor, count: int) -> Tensor:
    """Greedy decoding without a cache."""
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


prompts = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(1))
patterns = pytest.mark.parametrize("block_size", [None, 8], ids=["dense", "blockwise"])


@patterns
def test_greedy_tokens_are_those_of_full_forwards(block_size):
    model = language_model(block_size)
    assert torch.equal(model.generate(prompts, 40, temperature=0), continued(model, prompts, 40))


@patterns
def test_padded_prompts_go_on_as_each_would_alone(block_size):
    model, lengths = language_model(block_size), torch.tensor([11, 1, 7])
    together = model.generate(prompts, 30, lengths=lengths, temperature=0)
    for row, length in enumerate(lengths.tolist()):
        alone = continued(model, prompts[row : row + 1, :length], 30)[0]
        assert torch.equal(together[row, : length + 30], alone)
        assert not together[row, 41:].any()


@patterns
def test_a_stream_yields_the_tokens_that_generate_returns(block_size):
    model = language_model(block_size)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "seed": 5}
    streamed = torch.stack(list(model.stream(prompts, 20, **options)), 1)
    assert torch.equal(model.generate(prompts, 20, **options), torch.cat((prompts, streamed), 1))
    assert not torch.equal(model.generate(prompts, 20, **{**options, "seed": 6}), torch.cat((prompts, streamed), 1))


def test_a_stream_leaves_the_gradient_mode_alone_between_its_tokens():
    for _ in islice(language_model(8).stream(prompts, 5), 3):
        assert torch.is_grad_enabled()


def test_without_a_seed_the_global_generator_goes_on():
    model = language_model(8)
    torch.manual_seed(3)
    first, second = model.generate(prompts, 10), model.generate(prompts, 10)
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompts, 10), first)
    assert not torch.equal(first, second)


def test_an_ended_row_repeats_eos_and_all_ended_rows_end_the_text():
    model = language_model(8)
    free = model.generate(prompts, 30, temperature=0)[:, 11:]
    eos = int(free[0, 4])
    first = [row.tolist().index(eos) if eos in row.tolist() else 30 for row in free]
    given = model.generate(prompts, 30, temperature=0, eos=eos)[:, 11:]
    assert given.shape[1] == min(30, max(first) + 1)
    for row, end in enumerate(first):
        assert torch.equal(given[row, :end], free[row, : min(end, given.shape[1])])
        assert (given[row, end:] == eos).all()


def test_int32_tokens_and_autocast_work_as_int64_and_without():
    model = language_model(8)
    expected = model.generate(prompts, 10, temperature=0)
    narrow = model.generate(prompts.int(), 10, temperature=0)
    assert narrow.dtype == torch.int32
    assert torch.equal(narrow.long(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(prompts, 10, temperature=0).shape == expected.shape  # far logits, yet some may change


def test_no_new_tokens_give_the_prompt():
    assert torch.equal(language_model(None).generate(prompts, 0), prompts)


@pytest.mark.slow
@patterns
def test_a_compiled_step_draws_the_same_tokens_from_one_graph(block_size, compiler_counts):
    model = language_model(block_size)
    decode = torch.compile(model, fullgraph=True)
    assert torch.equal(
        model.generate(prompts, 300, temperature=0, decode=decode), model.generate(prompts, 300, temperature=0)
    )
    assert compiler_counts["stats"]["unique_graphs"] == 1
    assert not compiler_counts["graph_break"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.stream(prompts[0], 5), "tokens must be int64 or int32 (batch, seq_len), got torch."),
        (lambda m: m.stream(prompts[:, :0], 5), "tokens must have at least one token a row, got (3, 0)"),
        (lambda m: m.stream(prompts.float(), 5), "tokens must be int64 or int32 (batch, seq_len), got torch."),
        (lambda m: m.generate(prompts[0], 5), "tokens must be int64 or int32 (batch, seq_len), got torch."),
        (lambda m: m.generate(prompts[:, :0], 5), "tokens must have at least one token a row, got (3, 0)"),
        (lambda m: m.generate(prompts, 5, lengths=[1, 2, 3]), "lengths must be a tensor of integers, got [1, 2, 3]"),
        (lambda m: m.generate(prompts, -1), "max_new_tokens must be 0 or above, got -1"),
        (lambda m: m.stream(prompts, 5, temperature=-1), "temperature must be 0 or above"),
        (lambda m: m.stream(prompts, 5, top_k=0), "top_k must be 1 or above, got 0"),
        (lambda m: m.stream(prompts, 5, top_p=2), "top_p must be above 0 and at most 1, got 2"),
        (
            lambda m: m.stream(prompts, 5, lengths=torch.tensor([0, 3, 12])),
            "lengths must be from 1 to seq_len=11, got [0, 3, 12]",
        ),
        (lambda m: m.stream(prompts, 5, lengths=torch.tensor([3])), "lengths must be integers of shape (3,), got"),
        (lambda m: m(prompts, language_model(None).make_cache(3, 20)), "cache must be made for block_size=8, got one"),
        (
            lambda m: m(prompts, Transformer(50, 32, 1, 4, block_size=8).make_cache(3)),
            "cache must have 2 layers, got 1",
        ),
    ],
)
def test_errors_are_raised_by_the_call_itself(call, said):
    with pytest.raises(ValueError, match="must") as raised:
        call(language_model(8))
    assert said in str(raised.value)
