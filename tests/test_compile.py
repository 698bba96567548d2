"""The compile contract: one graph or two for all lengths, batch sizes and offsets, without a break.

Each mode is warmed first; then 30 shapes must do with the graphs that there are.
"""

import contextlib
import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from reference import Sloped, normal, relative_error, roundoff
from torch import Tensor, nn
from torch._inductor import config, metrics

from xpos_zoo import (
    XPOS,
    LogNScaling,
    MultiHeadAttention,
    SoftTail,
    Transformer,
    apply_rotary_pos_emb,
    fixed_pos_embedding,
    plan,
)
from xpos_zoo.rotary import RotaryEmbedding

pytestmark = pytest.mark.slow

Counts = dict[str, Counter[str]]
BLOCK = 8
LENGTHS = [57, 7, 17, 24, 31, 32, 40, 64, 71, 3, 16, *range(5, 15), *range(18, 28)]
MODES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


def check_graphs(
    function: Callable[..., Tensor],
    warm: Iterable[tuple],
    calls: Iterable[tuple],
    counts: Counts,
    at_most: int,
    mode: str = "grad",
) -> None:
    """`function`, compiled, must give what it gives eagerly, from at most so many graphs, all made by `warm`."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    before = counts["stats"]["unique_graphs"]
    # The compiler sums in another order; under autocast it also keeps float32 where eager mode rounds between steps.
    tolerance = 8 * roundoff(torch.bfloat16) if mode == "autocast" else 100 * roundoff(torch.float32)
    with MODES[mode]():
        for call in warm:
            compare(compiled, function, call, tolerance)
        with torch.compiler.set_stance("fail_on_recompile"):
            for call in calls:
                compare(compiled, function, call, tolerance)
    assert counts["stats"]["unique_graphs"] - before <= at_most
    assert not counts["graph_break"]


def compare(compiled: Callable[..., Tensor], function: Callable[..., Tensor], call: tuple, tolerance: float) -> None:
    ours, expected = compiled(*call), function(*call)
    tensors = [t for t in call if isinstance(t, Tensor) and t.requires_grad]
    if expected.requires_grad and tensors:
        upstream = normal(9, *expected.shape, dtype=expected.dtype)
        pairs = zip(
            (ours, *torch.autograd.grad(ours, tensors, upstream)),
            (expected, *torch.autograd.grad(expected, tensors, upstream)),
            strict=True,
        )
    else:
        pairs = [(ours, expected)]
    for one, other in pairs:
        assert relative_error(one, other) <= tolerance


def inputs(width: int, lengths: Iterable[int], grad: bool = True) -> list[tuple[Tensor]]:
    return [(normal(n, 2 + n % 3, n, width).requires_grad_(grad),) for n in lengths]


@pytest.mark.parametrize("module", [XPOS(8), RotaryEmbedding(8)], ids=["xpos", "rotary"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int offset", "tensor offset"])
def test_rotation_has_one_graph_for_all_lengths_and_offsets(module, as_tensor, compiler_counts):
    calls = [(x, torch.tensor(7 * i + 2) if as_tensor else 7 * i + 2) for i, (x,) in enumerate(inputs(8, range(3, 33)))]
    check_graphs(module, calls[:1], calls, compiler_counts, at_most=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_a_compiled_rotation(dtype, compiler_counts):
    """Of the module, and of what attention calls, whose pairs go as integers."""
    x, at = normal(0, 2, 9, 8, dtype=dtype).requires_grad_(), torch.arange(9)
    xpos = XPOS(8, 4)
    for function in (xpos, lambda x: torch.cat(xpos.rotate(x, x, at, at, 4))):
        ours, expected = torch.compile(function, fullgraph=True)(x), function(x)
        assert relative_error(ours, expected) <= 2 * roundoff(dtype)
        upstream = normal(1, *expected.shape, dtype=dtype)
        gradients = [torch.autograd.grad(output, x, upstream)[0] for output in (ours, expected)]
        assert relative_error(*gradients) <= 4 * roundoff(dtype)


def test_the_documented_functions_compile_at_any_length(compiler_counts):
    def third_example(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, *fixed_pos_embedding(x[0]), scale=0.5)

    compiled = torch.compile(third_example, fullgraph=True)
    for n in range(3, 13):
        x = normal(n, 2, n, 8)
        assert relative_error(compiled(x), third_example(x)) <= 4 * roundoff(torch.float32)
    assert compiler_counts["stats"]["unique_graphs"] <= 2


def test_no_number_stays_none_when_pairs_go_as_integers(compiler_counts):
    x, at = torch.full((1, 2, 8), torch.nan, dtype=torch.bfloat16), torch.arange(2)
    for bits in (0x7FFF, -1, 0x7F81):
        x = torch.full((1, 2, 8), bits, dtype=torch.int16).view(torch.bfloat16)
        rotated = torch.compile(XPOS(8).rotate, fullgraph=True)(x, x, at, at)
        assert all(t.isnan().all() for t in rotated)


def test_downscaling_has_a_graph_of_its_own(compiler_counts):
    calls = [(x, 5, True) for (x,) in inputs(8, range(3, 33))]
    check_graphs(XPOS(8), calls[:1], calls, compiler_counts, at_most=1)


def graphs_of(block_size: int | None) -> int:
    return 1 if block_size is None else 2


def attention(block_size: int | None) -> MultiHeadAttention:
    torch.manual_seed(0)
    positions = partial(XPOS, scale_base=16)
    return MultiHeadAttention(16, 2, num_kv_heads=1, positions=positions, block_size=block_size)


def language_model(block_size: int | None) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(20, 16, 2, 2, positions=partial(XPOS, scale_base=16), block_size=block_size)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["dense", "blockwise"])
def test_attention_has_two_graphs_for_all_shapes(block_size, mode, compiler_counts):
    """Dense one. Blockwise two: up to two blocks it is dense attention."""
    calls = inputs(16, LENGTHS, grad=mode in ("grad", "autocast"))
    check_graphs(attention(block_size), calls[:2], calls, compiler_counts, graphs_of(block_size), mode)


@pytest.mark.parametrize("mode", ["grad", "autocast"])
@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["dense", "blockwise"])
def test_a_soft_tail_and_a_temperature_add_no_graph(block_size, mode, compiler_counts):
    module = attention(block_size)
    module.distance_bias, module.query_scaling = SoftTail(3.0, 10), LogNScaling(0.5, 10)
    calls = inputs(16, LENGTHS)
    check_graphs(module, calls[:2], calls, compiler_counts, graphs_of(block_size), mode)


@pytest.mark.parametrize(
    "positions", [partial(Sloped, scale_base=16), partial(XPOS, scale_base=0.5)], ids=["bias", "beyond the span"]
)
def test_in_chunks_there_is_a_graph_for_each_number_of_them(positions, compiler_counts, monkeypatch):
    monkeypatch.setattr(plan, "QUERY_CHUNK", 16)
    calls = inputs(32, [30, 45, 18, 31, 32, 35, 40, 48])
    check_graphs(MultiHeadAttention(32, 4, positions=positions), calls[:2], calls, compiler_counts, at_most=2)


@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["dense", "blockwise"])
def test_a_length_that_nobody_marked_as_dynamic_costs_a_graph_more(block_size, compiler_counts):
    module = attention(block_size).requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True)
    for n in range(32, 2, -1):
        x = normal(n, 2, n, 16)
        assert relative_error(compiled(x), module(x)) <= 100 * roundoff(torch.float32)
    assert compiler_counts["stats"]["unique_graphs"] == 1 + graphs_of(block_size)
    assert not compiler_counts["graph_break"]


@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["dense", "blockwise"])
def test_the_transformer_has_two_graphs_for_all_shapes(block_size, compiler_counts):
    model = language_model(block_size)
    calls: list[tuple[Any, ...]] = [(torch.randint(20, (2 + n % 3, n)),) for n in LENGTHS]
    check_graphs(model, calls[:2], calls, compiler_counts, graphs_of(block_size))


@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["dense", "blockwise"])
def test_training_compiles_too(block_size, compiler_counts):
    """Gradients of all parameters equal those of eager mode."""
    model = language_model(block_size)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (40, 33, 48):
        tokens = torch.randint(20, (2, n))
        gradients = []
        for call in (compiled, model):
            model.zero_grad()
            call(tokens).logsumexp(-1).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
        assert relative_error(*gradients) <= 100 * roundoff(torch.float32)
    assert compiler_counts["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["dense", "blockwise"])
@pytest.mark.parametrize("settings", ["plain", "scaled", "documents"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch of itself
def test_layers_compiled_one_by_one_take_the_models_plan(settings, block_size, compiler_counts):
    """As the trainer does: with gradients, at lengths of whole blocks and others, and from a cache."""
    model = language_model(block_size)
    assert isinstance(model, Transformer)
    model.query_scaling = LogNScaling(0.5, 10) if settings == "scaled" else None
    compiled = copy.deepcopy(model)
    for layer in compiled.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for n in (40, 33, 48, 30):
        tokens = torch.randint(20, (2, n))
        ids = (torch.arange(n) // 13).expand(2, -1) if settings == "documents" else None
        results = []
        for each in (model, compiled):
            each.zero_grad()
            logits = each(tokens, document_ids=ids)
            logits.logsumexp(-1).sum().backward()
            results.append([logits, *(p.grad for p in each.parameters())])
        for ours, expected in zip(*reversed(results), strict=True):
            assert relative_error(ours, expected) <= 100 * roundoff(torch.float32)
    caches = [each.make_cache(2, 60) for each in (model, compiled)]
    for piece in torch.randint(20, (2, 50)).split([20, 1, 1, 28], dim=1):
        expected, ours = (each(piece, cache) for each, cache in zip((model, compiled), caches, strict=True))
        assert relative_error(ours, expected) <= 100 * roundoff(torch.float32)
    assert not compiler_counts["graph_break"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_that_float32_cannot_hold_reach_the_tables_whole(device, compiler_counts):
    """In a graph for any length they are inputs, which kernels on CUDA may take as float32."""
    xpos = XPOS(16, scale_base=333.3, base=12345.6).to(device)
    compiled = torch.compile(xpos.rotate, fullgraph=True, dynamic=True)
    for n in (1000, 1500):
        q, k = (normal(i, n, 16, dtype=torch.float64).to(device) for i in range(2))
        at = torch.arange(n, device=device)
        for ours, expected in zip(compiled(q, k, at, at), xpos.rotate(q, k, at, at), strict=True):
            assert relative_error(ours, expected) <= 100 * roundoff(torch.float64)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_rotate_in_a_kernel_besides_that_of_their_table(interleaved, dtype, compiler_counts):
    """Forward; with gradients it is one more."""
    xpos, at = XPOS(16, interleaved=interleaved), torch.arange(64)
    q, k = (normal(i, 2, 4, 64, 16, dtype=dtype) for i in range(2))

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return xpos.rotate(q, k, at, at, origin=32)

    with config.patch(force_disable_caches=True):
        for gradients in (0, 1):
            torch._dynamo.reset()
            metrics.reset()
            rotated = torch.compile(rotate, fullgraph=True)(
                q.requires_grad_(bool(gradients)), k.requires_grad_(bool(gradients))
            )
            if gradients:
                torch.autograd.grad(rotated, (q, k), (torch.ones_like(q), torch.ones_like(k)))
            assert metrics.generated_kernel_count <= 2 + gradients


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch of itself
@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["dense", "blockwise"])
def test_an_exported_and_packaged_block_gives_the_same_numbers(block_size, tmp_path, compiler_counts):
    """With dynamic batch and length; blockwise for lengths above two blocks."""
    module = attention(block_size).requires_grad_(False)
    shortest = 2 if block_size is None else 2 * block_size + 1
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=shortest, max=256)
    program = torch.export.export(
        module,
        (normal(0, 3, 40, 16),),
        dynamic_shapes={"x": {0: batch, 1: length}},
        prefer_deferred_runtime_asserts_over_guards=True,  # it cannot prove that padding never shortens
    )
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for (x,) in inputs(16, (shortest, 24, 40, 57, 256), grad=False):
        assert relative_error(program.module()(x), module(x)) <= 100 * roundoff(torch.float32)
        assert relative_error(loaded(x), module(x)) <= 100 * roundoff(torch.float32)
    # They need nothing of ours to load.
    torch.export.save(program, tmp_path / "block.program")
    script = (
        "import sys, torch; x = torch.ones(2, 40, 16); "
        "one = torch.export.load(sys.argv[1] + '/block.program').module()(x); "
        "other = torch._inductor.aoti_load_package(sys.argv[1] + '/block.pt2')(x); "
        "assert 'xpos_zoo' not in sys.modules; torch.save((one, other), sys.argv[1] + '/outputs')"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    for output in torch.load(tmp_path / "outputs"):
        assert relative_error(output, module(torch.ones(2, 40, 16))) <= 100 * roundoff(torch.float32)
