"""Padding anywhere in a row, with a cache and without: each row's real tokens come out as if they stood alone.

Axes: b batch, n sequence.
"""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PATTERNS, Sloped, block, model, normal, relative_error, tokens
from torch import Tensor, nn

from xpos_zoo import XPOS, LogNScaling, MultiHeadAttention, PositionModule, SoftTail

ROUNDOFFS = 3e-6  # relative: attention's contract, 2e-6 a score, whatever the tokens' order in memory
SIDES = {
    "left": [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 12],
    "right": [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0] * 11 + [1]],
    "both": [[1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1], [1] * 12],
    "holes": [[0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0]],
}


def with_gradients(module: nn.Module, x: Tensor, upstream: Tensor, **options: Any) -> list[Tensor]:
    """Output and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    output = module(x, **options)
    return [output, *torch.autograd.grad(output, (x, *module.parameters()), upstream)]


def assert_rows_are_as_alone(module: MultiHeadAttention, mask: Tensor, ids: Tensor | None = None) -> None:
    (b, n), width = mask.shape, module.embed_dim
    x, upstream = normal(0, b, n, width), normal(1, b, n, width)
    x[mask] = torch.nan  # padding may hold anything
    output, x_gradient, *others = with_gradients(module, x, upstream, key_padding_mask=mask, document_ids=ids)
    assert not output[mask].any()
    assert not x_gradient[mask].any()
    totals = [torch.zeros_like(t) for t in others]
    for row in range(b):
        real = ~mask[row]
        own = None if ids is None else ids[row : row + 1, real]
        alone = with_gradients(module, x[row, real][None], upstream[row, real][None], document_ids=own)
        assert relative_error(output[row, real], alone[0][0]) <= ROUNDOFFS
        assert relative_error(x_gradient[row, real], alone[1][0]) <= ROUNDOFFS
        totals = [total + t for total, t in zip(totals, alone[2:], strict=True)]
    for ours, total in zip(others, totals, strict=True):
        assert relative_error(ours, total) <= 4 * ROUNDOFFS  # sums over rows, whose terms may cancel


@pytest.mark.parametrize("side", SIDES)
@PATTERNS
def test_padding_on_any_side_is_as_if_it_were_not_there(side, block_size):
    attention = block(num_kv_heads=2, block_size=block_size and 3, positions=partial(XPOS, scale_base=4), bias=True)
    assert_rows_are_as_alone(attention, torch.tensor(SIDES[side]).bool())


@given(
    padding=st.integers(1, 40).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    block_size=st.none() | st.integers(1, 12),
    positions=st.sampled_from([partial(XPOS, scale_base=8), partial(XPOS, scale_base=0.3), Sloped]),
    scaling=st.none() | st.just(LogNScaling(0.5, 5)),
    tail=st.none() | st.just(SoftTail(2.0, 5)),
    documents=st.booleans(),
)
def test_every_row_is_as_alone(padding, block_size, positions, scaling, tail, documents):
    mask = torch.tensor(padding)
    ids = (torch.arange(mask.shape[1]) // 7).expand(mask.shape) if documents and scaling is None else None
    assert_rows_are_as_alone(block(32, 4, scaling, tail, positions=positions, block_size=block_size), mask, ids)


@given(
    padding=st.lists(
        st.integers(1, 12).flatmap(
            lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2, max_size=2)
        ),
        min_size=1,
        max_size=6,
    ),
    block_sizes=st.lists(st.none() | st.integers(1, 8), min_size=2, max_size=2),
)
def test_from_a_cache_every_row_goes_on_as_alone(padding, block_sizes):
    transformer = model(block_size=block_sizes).requires_grad_(False)
    cache, masks = transformer.make_cache(2), [torch.tensor(rows) for rows in padding]
    words = [tokens(*mask.shape) + i for i, mask in enumerate(masks)]
    pieces = [transformer(word % 50, cache, key_padding_mask=mask) for word, mask in zip(words, masks, strict=True)]
    together, mask, output = torch.cat(words, 1) % 50, torch.cat(masks, 1), torch.cat(pieces, 1)
    assert torch.equal(cache.length, (~mask).sum(1))
    at_once = transformer(together, key_padding_mask=mask)
    for row in range(2):
        alone = transformer(together[row, ~mask[row]][None])[0]
        assert relative_error(output[row, ~mask[row]], alone) <= 1e-5  # the contract of caches
        assert (
            relative_error(at_once[row, ~mask[row]], alone) <= 4 * ROUNDOFFS
        )  # of two layers, and what norms make of it


def test_a_mask_of_no_padding_changes_nothing():
    attention, x = block(block_size=8), normal(0, 2, 40, 32)
    assert torch.equal(attention(x, key_padding_mask=torch.zeros(2, 40, dtype=torch.bool)), attention(x))


def test_the_mask_is_that_of_torchs_attention():
    """Without positions both are the same function, at every token that is not padding."""
    ours = block(positions=lambda head_dim: PositionModule([0j] * (head_dim // 2))).double().requires_grad_(False)
    torchs = nn.MultiheadAttention(32, 4, bias=False, batch_first=True).double().requires_grad_(False)
    torchs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
    torchs.out_proj.weight.copy_(ours.out_proj.weight)
    mask, x = torch.tensor(SIDES["holes"]).bool(), normal(0, 2, 12, 32, dtype=torch.float64)
    causal = ~torch.ones(12, 12, dtype=torch.bool).tril()
    expected = torchs(x, x, x, key_padding_mask=mask, attn_mask=causal, need_weights=False)[0]
    assert relative_error(ours(x, key_padding_mask=mask)[~mask], expected[~mask]) <= 1e-14
