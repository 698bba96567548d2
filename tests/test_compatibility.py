"""What docs/compatibility.md says: torch's transforms, exporters and quantisers, and LoRA, do with ours what they do
with any module.
"""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from builders import PATTERNS, block, double, normal
from reference import attention, multi_head_attention, relative_error, roundoff
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from xpos_zoo import XPOS, LogNScaling, MultiHeadAttention, RotaryEmbedding, SoftTail, Transformer

EXACT = 100 * roundoff(torch.float32)  # the same operations, perhaps in another order
MODULES: dict[str, Callable[[], nn.Module]] = {
    "XPOS": lambda: XPOS(8, 16),
    "RotaryEmbedding": lambda: RotaryEmbedding(8),
    "dense": lambda: block(num_kv_heads=2),
    "blockwise": lambda: block(num_kv_heads=2, block_size=8),
}
BLOCKS = {name: make for name, make in MODULES.items() if name in ("dense", "blockwise")}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
each_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
pytestmark = pytest.mark.filterwarnings(  # torch, of itself
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:There is a performance drop",
    "ignore:torch.quantize_per_tensor",
)


def inputs(module: nn.Module, *shape: int) -> Tensor:
    return normal(len(shape), *shape, 32 if isinstance(module, MultiHeadAttention) else 8)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert relative_error(ours, expected) <= EXACT


@each_module
def test_outputs_may_be_changed_in_place(make):
    module = make()
    x = inputs(module, 2, 40).requires_grad_()
    once, halved = module(x), module(x)
    halved *= 0.5
    assert torch.equal(torch.autograd.grad(halved.sum(), x)[0], 0.5 * torch.autograd.grad(once.sum(), x)[0])


@each_module
def test_vmap_gives_what_a_loop_gives(make):
    module = make()
    x = inputs(module, 3, 2, 40)
    assert_same(torch.func.vmap(module)(x), torch.stack([module(row) for row in x]))


@each_block
def test_stacked_ensembles_and_per_sample_gradients_are_those_of_each_alone(make):
    modules = [make() for _ in range(3)]
    for i, module in enumerate(modules):
        nn.init.normal_(module.q_proj.weight, std=0.1 * (i + 1))
    parameters, _ = torch.func.stack_module_state(modules)
    x = inputs(modules[0], 3, 40)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], parameters, (row[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss))(parameters, x)
    for i, (module, row) in enumerate(zip(modules, x, strict=True)):
        module(row[None]).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert_same(together[name][i], parameter.grad)


@each_module
def test_forward_mode_batched_and_second_derivatives_are_right_on_the_math_backend(make):
    module = double(make())
    x = inputs(module, 1, 20).double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        assert gradcheck(module, x, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(module, x, fast_mode=True)


@each_module
def test_make_fx_gives_a_graph_with_the_same_numbers(make):
    module = make()
    x = inputs(module, 2, 40)
    graph = make_fx(module)(x)
    assert_same(graph(-2 * x), module(-2 * x))


@each_module
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_at_other_lengths_and_batch_sizes(make):
    module = make()
    traced = cast(Any, torch.jit.trace(module, inputs(module, 2, 40)))
    for shape in ((3, 43), (1, 64)):
        assert_same(traced(x := inputs(module, *shape)), module(x))


class Scores(nn.Module):
    """Queries that stand at the end of the keys, as torchscale's attention encodes them."""

    def __init__(self):
        super().__init__()
        self.xpos = XPOS(8, 16)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.xpos(q, offset=k.shape[1] - q.shape[1]) @ self.xpos(k, downscale=True).mT


def test_an_exported_program_takes_the_offset_from_lengths_that_it_does_not_know():
    any_shape = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim.DYNAMIC}
    example = normal(0, 2, 5, 8), normal(1, 2, 9, 8)
    program = torch.export.export(Scores(), example, dynamic_shapes=(any_shape, any_shape))
    for n, m in ((1, 9), (7, 7), (3, 20)):
        q, k = normal(n, 4, n, 8), normal(m, 4, m, 8)
        assert_same(program.module()(q, k), Scores()(q, k))


@pytest.mark.slow
@PATTERNS
def test_an_exported_block_gives_the_same_numbers_and_needs_nothing_of_ours(block_size, tmp_path, compiler_counts):
    """With dynamic batch and length; blockwise for lengths above two blocks, and packaged as generated code, too."""
    module = block(block_size=block_size).requires_grad_(False)
    shortest = 2 if block_size is None else 2 * block_size + 1
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=shortest, max=256)
    program = torch.export.export(
        module,
        (normal(0, 3, 40, 32),),
        dynamic_shapes={"x": {0: batch, 1: length}},
        prefer_deferred_runtime_asserts_over_guards=True,  # it cannot prove that padding never shortens
    )
    torch.export.save(program, tmp_path / "block.program")
    load = "torch.export.load(sys.argv[1] + '/block.program').module()"
    if block_size is not None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        load += ", torch._inductor.aoti_load_package(sys.argv[1] + '/block.pt2')"
    script = (
        f"import sys, torch; calls = [{load}]; inputs = torch.load(sys.argv[1] + '/inputs'); "
        "outputs = [call(x) for call in calls for x in inputs]; "
        "assert 'xpos_zoo' not in sys.modules; torch.save(outputs, sys.argv[1] + '/outputs')"
    )
    given = [normal(n, 2 + n % 3, n, 32) for n in (shortest, 40, 57, 256)]
    torch.save(given, tmp_path / "inputs")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    outputs = torch.load(tmp_path / "outputs")
    assert len(outputs) == len(given) * (1 if block_size is None else 2)
    for output, x in zip(outputs, given * 2, strict=False):
        assert_same(output, module(x))


@pytest.mark.slow
@each_module
def test_onnxruntime_runs_an_export_at_any_length(make, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module, any_length = make().eval(), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(module, (inputs(module, 2, 40),), dynamo=True, dynamic_shapes=(any_length,))
    assert program is not None
    program.save(tmp_path / "module.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "module.onnx")
    for shape in ((3, 43), (2, 64)):
        x = inputs(module, *shape)
        assert_same(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), module(x))


@each_module
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_gives_the_same_numbers(copied, make):
    module = make()
    if isinstance(module, MultiHeadAttention):
        module.query_scaling, module.distance_bias = LogNScaling(0.5, 5), SoftTail(3.0, 10)
    x = inputs(module, 2, 40)
    assert torch.equal(copied(module)(x), module(x))


class Int8Linear(nn.Module):
    """A projection whose weight is int8, as several libraries store it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).mT


def replaced(kind: Callable[[nn.Linear], nn.Module]) -> Callable[[MultiHeadAttention], None]:
    def replace(module: MultiHeadAttention) -> None:
        module.q_proj, module.k_proj, module.v_proj = map(kind, (module.q_proj, module.k_proj, module.v_proj))  # type: ignore[arg-type]

    return replace


def dynamic_int8(module: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8, inplace=True)


def torchao_int8(module: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(module, torchao.Int8WeightOnlyConfig())


@each_block
@pytest.mark.parametrize("quantise", [dynamic_int8, torchao_int8, replaced(Int8Linear), replaced(nn.Sequential)])
def test_projections_may_be_quantised_or_without_a_weight(quantise, make):
    """What they give is attended to by the formula, and from a cache as without."""
    module = make()
    module.out_proj = nn.Identity()  # or the formula's roundoff might become a quantum
    x = inputs(module, 2, 40)
    before = module(x)
    quantise(module)
    ours = module(x)
    assert type(module.q_proj) is not nn.Linear or type(module.q_proj.weight) is not nn.Parameter
    assert_same(ours, multi_head_attention(module, x, attention))
    assert relative_error(ours, before) < 0.1
    assert_same(module(x, cache=module.make_cache(2, 40)), ours)


@each_block
def test_lora_trains_adapters_alone_and_merges(make):
    peft = pytest.importorskip("peft")
    module, targets = make(), ["q_proj", "k_proj", "v_proj", "out_proj"]
    x = inputs(module, 2, 40)
    adapted = peft.get_peft_model(module, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    output = adapted(x)
    output.sum().backward()
    learned = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(learned) == 2 * len(targets)
    assert all("lora_" in name for name in learned)
    assert_same(adapted.merge_and_unload()(x), output)


@pytest.mark.parametrize(
    "make", [lambda **options: block(**options), lambda **options: Transformer(50, 32, 1, 4, **options)]
)
def test_device_and_dtype_are_arguments_as_of_torchs_modules(make):
    module, cast = make(device="meta", dtype=torch.bfloat16), make().bfloat16()
    assert {name: t.dtype for name, t in module.state_dict().items()} == {
        name: t.dtype for name, t in cast.state_dict().items()
    }
    assert all(t.is_meta for t in module.state_dict().values())


def test_weights_of_a_rope_model_load_into_an_xpos_model_also_from_the_meta_device():
    rope, x = block(positions=RotaryEmbedding, block_size=12), normal(0, 2, 40, 32)
    expected = block(block_size=12)(x)
    with torch.device("meta"):
        assigned, emptied = (MultiHeadAttention(32, 4, block_size=12) for _ in range(2))
    xpos = block(block_size=12)
    nn.init.zeros_(xpos.q_proj.weight)
    for module, assign in ((xpos, False), (assigned, True), (emptied.to_empty(device="cpu"), False)):
        module.load_state_dict(rope.state_dict(), assign=assign)
        assert torch.equal(module(x), expected)


@each_block
def test_unsupported_uses_raise_an_error(make):
    module = make()
    x = inputs(module, 2, 40)
    with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product_flash_attention"):
        torch.func.jvp(module, (x,), (x,))
    with pytest.raises(Exception, match=r"einops|control flow"):
        torch.fx.symbolic_trace(module)
    with pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(module)
