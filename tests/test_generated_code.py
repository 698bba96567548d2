"""What TorchInductor generates: its values, and how many kernels it takes."""

import pytest
import torch
from builders import block, far_apart, model, normal, tokens
from reference import assert_block_is_exact, relative_error, roundoff
from torch import Tensor
from torch._inductor import config, metrics

from xpos_zoo import XPOS, LogNScaling, MultiHeadAttention

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize(("dtype", "interleaved"), [(torch.bfloat16, True), (torch.float32, False)])
def test_queries_and_keys_rotate_in_a_kernel_besides_that_of_their_table(dtype, interleaved, compiler_counts):
    """And with gradients it is one kernel more."""
    xpos, at = XPOS(16, interleaved=interleaved), torch.arange(64)
    q, k = (normal(i, 2, 4, 64, 16, dtype=dtype) for i in range(2))

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return xpos.rotate(q, k, at, at, origin=32)

    with config.patch(force_disable_caches=True):
        for gradients in (0, 1):
            torch._dynamo.reset()
            metrics.reset()
            q, k = (t.requires_grad_(bool(gradients)) for t in (q, k))
            rotated, expected = torch.compile(rotate, fullgraph=True)(q, k), rotate(q, k)
            pairs = list(zip(rotated, expected, strict=True))
            if gradients:
                upstream = [normal(8, *q.shape, dtype=dtype)] * 2
                both = (torch.autograd.grad(output, (q, k), upstream) for output in (rotated, expected))
                pairs += zip(*both, strict=True)
            assert all(relative_error(*pair) <= 4 * roundoff(dtype) for pair in pairs)
            assert metrics.generated_kernel_count <= 2 + gradients


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_that_float32_cannot_hold_reach_the_tables_whole(device, compiler_counts):
    """In code for any length they are inputs, which kernels on CUDA may take as float32."""
    xpos = XPOS(16, scale_base=333.3, base=12345.6).to(device)
    compiled = torch.compile(xpos.rotate, fullgraph=True, dynamic=True)
    for n in (1000, 1500):
        q, k = (normal(i, n, 16, dtype=torch.float64).to(device) for i in range(2))
        at = torch.arange(n, device=device)
        for ours, expected in zip(compiled(q, k, at, at), xpos.rotate(q, k, at, at), strict=True):
            assert relative_error(ours, expected) <= 100 * roundoff(torch.float64)


def test_a_compiled_block_equals_the_formula_at_several_lengths(compiler_counts):
    def run(module: MultiHeadAttention, x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 1)
        return compiled(module, x)

    compiled = torch.compile(MultiHeadAttention.forward, fullgraph=True)
    module = block(num_kv_heads=2, qk_norm=True, query_scaling=LogNScaling(0.5, 10), block_size=12)
    for n in (30, 36):  # blocks are full or not
        assert_block_is_exact(module, normal(0, 2, n, 32), run)


def test_a_step_draws_the_same_tokens_from_one_graph(compiler_counts):
    transformer = far_apart(model(1, block_size=8))
    decode = torch.compile(transformer, fullgraph=True)
    ours, expected = (transformer.generate(tokens(3, 11), 40, temperature=0, decode=each) for each in (decode, None))
    assert torch.equal(ours, expected)
    assert compiler_counts["stats"]["unique_graphs"] == 1
    assert not compiler_counts["graph_break"]
