"""Ranks that share rows, or heads, compute what one process does on whole ones: outputs and gradients.

Four processes are spawned once and make all claims, one after the other; a test fails if its claim did on any rank.
"""

import copy
import os
import random
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import DTYPES, LearnedBias, Operations, block, double, model, normal, tokens
from reference import difference, roundoff
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.multiprocessing.spawn import spawn

from xpos_zoo import XPOS, LogNScaling, RotaryEmbedding, ScaleInvariant, SoftTail

RANKS = 4
PATIENCE = timedelta(minutes=5)  # of a collective, while others compile
CASES = 24
Claim = Callable[[dict[int, DeviceMesh]], None]


def shard(mesh: DeviceMesh, t: Tensor) -> Tensor:
    return t.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


def assert_same_as_alone(
    module: Any, mesh: DeviceMesh, x: Tensor, run: Callable[..., Tensor] | None = None, **settings: Any
) -> None:
    """Of `module` with the mesh and without: outputs, and gradients by x (if it has any) and by all parameters.

    In another order of sums: up to 100 roundoffs of the largest are between them, for a gradient may be a sum that
    cancels.
    """
    mine = shard(mesh, x).detach().requires_grad_(x.requires_grad)
    own = {name: None if value is None else shard(mesh, value) for name, value in settings.items()}

    def results(output: Tensor, x: Tensor, upstream: Tensor) -> list[Tensor]:
        inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    module.cp_mesh = None
    alone = module(x, **settings)
    upstream = normal(99, *alone.shape, dtype=alone.dtype)
    expected = results(alone, x, upstream)
    module.cp_mesh = mesh
    found = results((module if run is None else run)(mine, **own), mine, shard(mesh, upstream))
    whole = 2 if x.requires_grad else 1  # what follows is of parameters
    for t in found[whole:]:
        dist.all_reduce(t, group=mesh.get_group())
    largest = max(t.norm().item() for t in expected)
    for ours, right in zip(found, [*(shard(mesh, t) for t in expected[:whole]), *expected[whole:]], strict=True):
        assert ours.shape == right.shape
        assert difference(ours, right) <= 100 * roundoff(right.dtype) * largest


def outputs_and_all_gradients_of_a_block_are_those_of_one_process(meshes):
    """Dense, in blocks and with windows; random lengths, grouped heads, documents, biases and factors by position."""
    draw = random.Random(0).choice
    for case in range(CASES):
        mesh, w, h = meshes[draw([1, 2, 4])], draw([1, 2, 5, 8]), 4
        positions = draw([XPOS, RotaryEmbedding, partial(XPOS, scale_base=0.3), partial(XPOS, max_wavelength=50)])
        bias = draw([None, None, SoftTail(2.0, 5), ScaleInvariant(3.0), LearnedBias()])
        documents, scaling = draw([True, False]), draw([None, LogNScaling(0.5, 3)])
        pattern: dict[str, Any] = draw([{}, {"block_size": w}, {"window_size": w}])
        options = pattern | {"num_kv_heads": draw([1, 2, 4])}
        options |= {name: draw([True, False]) for name in ("bias", "qk_norm", "output_gate")}
        module = block(32, h, positions=positions, query_scaling=scaling, distance_bias=bias, **options).to(
            draw(DTYPES[:2])
        )
        length = w * draw([1, 2, 3, 7])  # of each rank
        b, n = draw([1, 3]), (length if "block_size" in options else length + draw([0, 1, 3])) * mesh.size()
        x = normal(case, b, n, 32, dtype=module.q_proj.weight.dtype).requires_grad_()
        ids = tokens(b, n, below=5 * n).sort().values // (3 * w) if documents else None
        assert_same_as_alone(module, mesh, x, document_ids=ids)


def a_model_of_layers_that_differ_trains_as_in_one_process(meshes):
    xpos, words = partial(XPOS, scale_base=8), tokens(2, 96)
    sizes: dict[str, Any] = {"block_size": [4, None, None], "window_size": [None, 8, None], "num_kv_heads": 2}
    transformer = double(model(3, positions=[xpos, RotaryEmbedding, xpos], **sizes))
    for transformer.checkpoint_activations in (False, True):
        for ids in (None, (torch.arange(96) // 7).expand(2, -1)):
            assert_same_as_alone(transformer, meshes[4], words, document_ids=ids)


def no_tensor_is_larger_than_those_of_the_shard_and_one_block(meshes):
    mesh, w, n = meshes[4], 8, 80
    module, x = block(block_size=w), normal(0, 2, n + w, 32)
    largest = []
    for mine, module.cp_mesh in ((x, None), (x[:, w:], mesh)):
        with Operations() as seen:
            module(mine).sum().backward()
        largest.append(seen.largest)
    assert largest[1] <= largest[0]


def compiled_the_exchange_is_a_part_of_the_graph(meshes):
    from torch._dynamo.utils import counters

    if dist.get_rank() >= 2:  # two ranks have all that there is, and compiling takes long
        return
    torch._dynamo.reset()
    counters.clear()
    module = double(block(block_size=4, num_kv_heads=2))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 80, 56):
        ids, x = (torch.arange(n) // 7).expand(2, -1), normal(n, 2, n, 32, dtype=torch.float64).requires_grad_()
        assert_same_as_alone(module, meshes[2], x, compiled, document_ids=ids)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def ranks_that_share_the_heads_of_a_block_compute_what_one_does(meshes):
    """Tensor parallelism: outputs, gradients, compiled, and from a cache."""
    if dist.get_rank() >= 2:
        return
    alone = double(block(num_kv_heads=2, block_size=8, qk_norm=True))
    split, joined = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, ParallelStyle] = {"q_proj": split, "k_proj": split, "v_proj": split, "out_proj": joined}
    plan |= dict.fromkeys(("q_norm", "k_norm"), SequenceParallel(sequence_dim=2, use_local_output=True))
    shared: Any = parallelize_module(copy.deepcopy(alone), meshes[2], plan)
    shared.num_kv_heads //= 2  # of its caches
    x, upstream = (normal(i, 2, 40, 32, dtype=torch.float64).requires_grad_() for i in range(2))
    expected = alone(x)
    gradients = torch.autograd.grad(expected, [x, *alone.parameters()], upstream)
    for call in (shared, torch.compile(shared, fullgraph=True, backend="aot_eager")):
        found = call(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        mine = torch.autograd.grad(found, [x, *shared.parameters()], upstream)
        for t, gradient in zip(mine, gradients, strict=True):
            whole = t.full_tensor() if isinstance(t, DTensor) else t
            torch.testing.assert_close(whole, gradient, rtol=1e-12, atol=1e-13)
    cache = shared.make_cache(2)
    decoded = [shared(x[:, i : i + 1], cache=cache) for i in range(x.shape[1])]
    torch.testing.assert_close(torch.cat(decoded, dim=1), expected.detach(), rtol=1e-12, atol=1e-14)


def what_cannot_be_cut_is_refused_before_anything_is_sent(meshes):
    module: Any = block(block_size=4)
    x = torch.zeros(2, 8, 32)
    for wrong in (2, "cp", init_device_mesh("cpu", (2, 2)), dist.group.WORLD):
        with pytest.raises(ValueError, match="cp_mesh must be a DeviceMesh of one dimension, or None, got"):
            module.cp_mesh = wrong
    module.cp_mesh = meshes[4] if dist.get_rank() else meshes[2]  # whose others do not answer
    for n in (0, 3, 9):
        with pytest.raises(ValueError, match=f"seq_len must be a multiple of block_size=4 with cp_mesh, got {n}"):
            module(torch.zeros(2, n, 32))
    with pytest.raises(ValueError, match="cache must be None with cp_mesh"):
        module(x, module.make_cache(2))
    module.set_attention(block_size=None, window_size=9)
    with pytest.raises(ValueError, match="seq_len must be at least window_size=9 with cp_mesh, got 8"):
        module(x)
    transformer = model(2, block_size=[4, None])
    transformer.cp_mesh = [meshes[4], None]
    with pytest.raises(ValueError, match="cp_mesh must be the same in all layers"):
        transformer(tokens(2, 8))


def a_rank_that_dies_ends_the_others_with_an_error(meshes):
    """The last of the claims, for what it leaves."""
    module, x = block(block_size=4), torch.zeros(2, 8, 32)
    module.cp_mesh = meshes[4]
    module(x).sum().backward()
    if dist.get_rank() == 1:
        os._exit(0)
    with pytest.raises(RuntimeError):
        module(x).sum().backward()


CLAIMS: list[Claim] = [
    outputs_and_all_gradients_of_a_block_are_those_of_one_process,
    a_model_of_layers_that_differ_trains_as_in_one_process,
    ranks_that_share_the_heads_of_a_block_compute_what_one_does,
    no_tensor_is_larger_than_those_of_the_shard_and_one_block,
    compiled_the_exchange_is_a_part_of_the_graph,
    what_cannot_be_cut_is_refused_before_anything_is_sent,
    a_rank_that_dies_ends_the_others_with_an_error,
]


def make_claims(rank: int, folder: Path) -> None:
    """Each claim's failure, or nothing, in a file of its name and the rank."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=PATIENCE)
    meshes = {
        size: init_device_mesh("cpu", (RANKS // size, size), mesh_dim_names=("dp", "cp"))["cp"] for size in (1, 2, 4)
    }
    for claim in CLAIMS:
        result = folder / f"{claim.__name__}-{rank}"
        result.write_text("it died")
        try:
            claim(meshes)
            result.write_text("")
        except Exception:
            result.write_text(traceback.format_exc())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def claimed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    spawn(make_claims, (folder,), nprocs=RANKS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_each_claim_holds_on_every_rank(claim, claimed):
    for rank in range(RANKS):
        failure = (claimed / f"{claim.__name__}-{rank}").read_text()
        died = claim is a_rank_that_dies_ends_the_others_with_an_error and rank == 1
        assert failure == ("it died" if died else ""), f"rank {rank}: {failure}"
