"""The compile contract: one graph or two for all lengths, batch sizes and offsets, without a break.

Graphs are counted without generating code. Each mode is warmed first; then all other shapes must do with the graphs
that there are.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from builders import PATTERNS, block, model, normal, tokens
from reference import relative_error, roundoff
from torch import Tensor, nn

from xpos_zoo import (
    XPOS,
    LogNScaling,
    RotaryEmbedding,
    ScaleInvariant,
    SoftTail,
    apply_rotary_pos_emb,
    dense,
    fixed_pos_embedding,
)

pytestmark = pytest.mark.slow

Counts = dict[str, Counter[str]]
LENGTHS = [41, 7, 17, 24, 3, 16]  # of blocks of 8: first two that need a graph each
CLOSE = 100 * roundoff(torch.float32)  # the compiler sums in another order
compile_graph = partial(torch.compile, fullgraph=True, backend="aot_eager")


def results(function: Callable[..., Any], call: tuple) -> list[Tensor]:
    """Outputs, and gradients by the inputs that ask for them and by a module's parameters."""
    output = function(*call)
    weights = function.parameters() if isinstance(function, nn.Module) else ()
    inputs = [t for t in (*call, *weights) if isinstance(t, Tensor) and t.requires_grad]
    if not (inputs and output.requires_grad):
        return [output]
    return [output, *torch.autograd.grad(output, inputs, normal(9, *output.shape, dtype=output.dtype))]


def assert_same(
    compiled: Callable[..., Any], function: Callable[..., Any], call: tuple, tolerance: float = CLOSE
) -> None:
    for ours, expected in zip(results(compiled, call), results(function, call), strict=True):
        assert relative_error(ours, expected) <= tolerance


def check_graphs(
    function: Callable[..., Any], calls: list[tuple], counts: Counts, at_most: int, tolerance: float = CLOSE
) -> None:
    """`function`, compiled, must give what it gives eagerly, from at most so many graphs, made by as many calls."""
    compiled = compile_graph(function, dynamic=True)
    for call in calls[:at_most]:
        assert_same(compiled, function, call, tolerance)
    with torch.compiler.set_stance("fail_on_recompile"):
        for call in calls:
            assert_same(compiled, function, call, tolerance)
    assert counts["stats"]["unique_graphs"] <= at_most
    assert not counts["graph_break"]


def inputs(width: int, lengths: Iterable[int], grad: bool = True) -> list[tuple[Tensor]]:
    return [(normal(n, 2 + n % 3, n, width).requires_grad_(grad),) for n in lengths]


def graphs_of(block_size: int | None = None, window_size: int | None = None, **_: Any) -> int:
    """Dense one. Blockwise two: up to two blocks, or one window, it is dense attention."""
    return 1 if block_size is window_size is None else 2


@pytest.mark.parametrize("module", [XPOS(8), RotaryEmbedding(8)], ids=["xpos", "rotary"])
@pytest.mark.parametrize("offset", [int, torch.tensor], ids=["int", "tensor"])
def test_rotation_has_one_graph_for_all_lengths_and_offsets(module, offset, compiler_counts):
    downscale = [True] if isinstance(module, XPOS) else []
    calls = [(x, offset(7 * i + 2), *downscale) for i, (x,) in enumerate(inputs(8, range(3, 23)))]
    check_graphs(module, calls, compiler_counts, at_most=1)


def test_the_documented_functions_compile_at_any_length(compiler_counts):
    def third_example(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, *fixed_pos_embedding(x[0]), scale=0.5)

    compiled = compile_graph(third_example)
    for n in range(3, 13):
        assert_same(compiled, third_example, (normal(n, 2, n, 8),))
    assert compiler_counts["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("bits", [0x7FFF, -1, 0x7F81])
def test_nan_stays_nan_when_pairs_are_moved_as_integers(bits, compiler_counts):
    x, at = torch.full((1, 2, 8), bits, dtype=torch.int16).view(torch.bfloat16), torch.arange(2)
    assert all(t.isnan().all() for t in compile_graph(XPOS(8).rotate)(x, x, at, at))


def test_logits_by_distance_and_scaled_queries_add_no_graph_under_autocast(compiler_counts):
    module = block(query_scaling=LogNScaling(0.5, 10), distance_bias=ScaleInvariant(3.0), block_size=8)
    module.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        tolerance = 8 * roundoff(torch.bfloat16)  # compiled, it keeps float32 where eager mode rounds between steps
        check_graphs(module, [*inputs(32, LENGTHS, grad=False)], compiler_counts, graphs_of(8), tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"distance_bias": ScaleInvariant(3.0)},
        {"distance_bias": SoftTail(2.0, 10), "positions": partial(XPOS, scale_base=1)},
        {"positions": partial(XPOS, scale_base=1)},
    ],
    ids=["gain", "tail beyond the span", "beyond the span"],
)
def test_dense_attention_in_chunks_has_a_graph_for_many_lengths(options, compiler_counts, monkeypatch):
    """Of 1, 2 or 4 chunks of up to 32 queries here, which stand for 1, 4 or 16 of 2048; and one graph that decodes."""
    monkeypatch.setattr(dense, "MASK_CHUNK", 16)
    monkeypatch.setattr(dense, "GRAPH_GROWTH", 2)
    module = block(**options)
    check_graphs(module, inputs(32, [50, 10, 128, 64, 33, 31, 65, 7, 100]), compiler_counts, at_most=3)
    compiled, cache = compile_graph(module.requires_grad_(False)), module.make_cache(2, 60)
    x = normal(0, 2, 60, 32)
    outputs = [module(x[:, :40], cache=cache)]
    outputs += [compiled(x[:, i : i + 1], cache=cache) for i in range(40, 60)]
    assert compiler_counts["stats"]["unique_graphs"] <= 4
    assert relative_error(torch.cat(outputs, 1), module(x)) <= 1e-5


@pytest.mark.parametrize("span", [XPOS(8, 64).max_span(torch.float32), dense.NO_LIMIT])
def test_lengths_to_twenty_thousand_are_cut_into_three_numbers_of_chunks(span, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    limit, counts = 2 * dense.MASK_CHUNK, set()
    for n in range(1, 20_001):
        size, chunks = dense.split_into_chunks(n, dense.origin_limit(span, limit))
        counts.add(len(chunks))
        assert size <= limit
        assert chunks[0][0] == 0
        assert chunks[-1][1] == n
        assert all(0 < stop - start <= size for start, stop in chunks)
    assert counts == {1, 4, 16}


WINDOW = {"window_size": 8, "output_gate": True, "qk_norm": True}


@pytest.mark.parametrize("options", [{}, {"block_size": 8}, WINDOW], ids=["dense", "blockwise", "window"])
def test_the_transformer_trains_in_two_graphs(options, compiler_counts):
    calls = [(tokens(2 + n % 3, n),) for n in LENGTHS]
    check_graphs(model(1, **options), calls, compiler_counts, graphs_of(**options))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch of itself
def test_layers_compiled_one_by_one_take_the_models_plan(compiler_counts):
    """As the trainer does: with gradients and documents, at lengths of whole blocks and others, and from a cache."""
    transformer = model(1, block_size=8)
    compiled = copy.deepcopy(transformer)
    for layer in compiled.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for n in (40, 33):
        ids = (torch.arange(n) // 13).expand(2, -1)
        assert_same(partial(compiled, document_ids=ids), partial(transformer, document_ids=ids), (tokens(2, n),))
    compiled.query_scaling = transformer.query_scaling = LogNScaling(0.5, 10)
    caches = [each.make_cache(2, 60) for each in (compiled, transformer)]
    for piece in tokens(2, 50).split([20, 1, 1, 28], dim=1):
        assert relative_error(compiled(piece, caches[0]), transformer(piece, caches[1])) <= CLOSE
    assert not compiler_counts["graph_break"]


@PATTERNS
def test_padding_adds_no_graph(block_size, compiler_counts):
    module = block(block_size=block_size)
    masked = lambda x, mask: module(x, key_padding_mask=mask)  # noqa: E731
    calls = [(x, normal(7, *x.shape[:2]) > 1) for (x,) in inputs(32, LENGTHS)]
    check_graphs(masked, calls, compiler_counts, graphs_of(block_size))


BIASED = {
    "qk_norm": True,
    "query_scaling": LogNScaling(0.5, 10),
    "distance_bias": SoftTail(4.0, 10),
    "block_size": 8,
}


@pytest.mark.parametrize("options", [{}, BIASED, WINDOW], ids=["dense", "blockwise", "window"])
def test_one_graph_decodes_and_prefill_has_those_of_a_forward_without_a_cache(options, compiler_counts):
    module = block(**options)
    compiled = compile_graph(module.requires_grad_(False))
    sizes = [2, 3, 16, 17, 30, *[1] * 20]
    x, cache, outputs = normal(0, 2, sum(sizes), 32), module.make_cache(2, sum(sizes)), []
    with torch.no_grad():
        for piece in x.split(sizes, dim=1):
            outputs.append(compiled(piece, cache=cache))
            assert compiler_counts["stats"]["unique_graphs"] - (piece.shape[1] == 1) <= 1 + graphs_of(**options)
    assert not compiler_counts["graph_break"]
    assert relative_error(torch.cat(outputs, 1), module(x)) <= 1e-5


def test_a_full_cache_raises_from_a_graph_too(compiler_counts):
    module = block().requires_grad_(False)
    cache, compiled, x = module.make_cache(1, 3), compile_graph(module), torch.zeros(1, 1, 32)
    for _ in range(3):
        compiled(x, cache=cache)
    with pytest.raises(RuntimeError, match="cache is full: see its max_length"):
        compiled(x, cache=cache)
