"""Padding anywhere in a row, with a cache and without: each row's real tokens come out as if they stood alone.

Axes: b batch, n sequence.
"""

from functools import partial

import torch
from builders import block, locality, model, normal, tokens
from hypothesis import given
from hypothesis import strategies as st
from reference import difference, gradients, relative_error, sloped
from torch import nn

from xpos_zoo import XPOS, LogNScaling, PositionModule, SoftTail

ROUNDOFFS = 3e-6  # relative: attention's contract, 2e-6 a score, whatever the tokens' order in memory


def masks(b: int, most: int, rows: int) -> st.SearchStrategy[list[list[bool]]]:
    """(b to rows, 1 to most), True for padding."""
    return st.integers(1, most).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=rows)
    )


@given(
    padding=masks(1, 40, 3),
    local=locality(None, 1, 3, 12),
    positions=st.sampled_from([partial(XPOS, scale_base=8), partial(XPOS, scale_base=0.3)]),
    scaling=st.none() | st.just(LogNScaling(0.5, 5)),
    tail=st.sampled_from([None, SoftTail(2.0, 5), sloped]),
    documents=st.booleans(),
    num_kv_heads=st.sampled_from([2, 4]),
    bias=st.booleans(),
    qk_norm=st.booleans(),
)
def test_a_padded_row_gives_what_it_gives_alone(padding, local, scaling, tail, documents, **options):
    module, mask = block(query_scaling=scaling, distance_bias=tail, **local, **options), torch.tensor(padding)
    b, n = mask.shape
    ids = (torch.arange(n) // 7).expand(b, n) if documents else None
    x, upstream = normal(0, b, n, 32), normal(1, b, n, 32)
    x[mask] = torch.nan  # padding may hold anything
    x.requires_grad_()
    together = module(x, key_padding_mask=mask, document_ids=ids)
    alone = torch.zeros_like(together)
    for row, real in enumerate(~mask):
        own = None if ids is None else ids[row : row + 1, real]
        alone[row, real] = module(x[row, real][None], document_ids=own)[0]
    results, expected = ([y, *gradients(y, upstream, (x, *module.parameters()))] for y in (together, alone))
    assert not any(t[mask].any() for t in results[:2])
    assert all(relative_error(*both) <= ROUNDOFFS for both in zip(results[:2], expected[:2], strict=True))
    largest = max(t.norm().item() for t in expected[2:])  # of sums over rows, whose terms may cancel
    assert all(difference(*both) <= 4 * ROUNDOFFS * largest for both in zip(results[2:], expected[2:], strict=True))


@given(
    padding=st.lists(masks(2, 12, 2), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 4, None]),
    window_size=st.sampled_from([1, 5, None]),
)
def test_a_padded_row_decodes_as_it_does_alone(padding, block_size, window_size):
    """Through layers that differ."""
    positions, scaling = [partial(XPOS, scale_base=4), partial(XPOS, max_wavelength=40)], [None, LogNScaling(0.3, 10)]
    options = {"positions": positions, "query_scaling": scaling, "num_kv_heads": 2}
    transformer = model(block_size=[block_size, None], window_size=[None, window_size], **options).requires_grad_(False)
    cache, masks = transformer.make_cache(2), [torch.tensor(rows) for rows in padding]
    words = [(tokens(*mask.shape) + i) % 50 for i, mask in enumerate(masks)]
    pieces = [transformer(word, cache, key_padding_mask=mask) for word, mask in zip(words, masks, strict=True)]
    together, mask, output = torch.cat(words, 1), torch.cat(masks, 1), torch.cat(pieces, 1)
    assert torch.equal(cache.length, (~mask).sum(1))
    at_once = transformer(together, key_padding_mask=mask)
    for row, real in enumerate(~mask):
        alone = transformer(together[row, real][None])[0]
        assert relative_error(output[row, real], alone) <= 1e-5  # the contract of caches
        assert relative_error(at_once[row, real], alone) <= 4 * ROUNDOFFS  # of two layers, and what norms make of it


def test_a_mask_of_no_padding_changes_nothing():
    attention, x = block(block_size=8), normal(0, 2, 40, 32)
    assert torch.equal(attention(x, key_padding_mask=torch.zeros(2, 40, dtype=torch.bool)), attention(x))


def test_the_mask_is_that_of_torchs_attention():
    """Without positions both are the same function, at every token that is not padding."""
    ours = block(positions=lambda head_dim: PositionModule([0j] * (head_dim // 2))).double().requires_grad_(False)
    torchs = nn.MultiheadAttention(32, 4, bias=False, batch_first=True).double().requires_grad_(False)
    torchs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
    torchs.out_proj.weight.copy_(ours.out_proj.weight)
    mask, x = tokens(2, 12, below=2).bool(), normal(0, 2, 12, 32, dtype=torch.float64)
    causal = ~torch.ones(12, 12, dtype=torch.bool).tril()
    expected = torchs(x, x, x, key_padding_mask=mask, attn_mask=causal, need_weights=False)[0]
    assert relative_error(ours(x, key_padding_mask=mask)[~mask], expected[~mask]) <= 1e-14
