"""Two processes train what one would on both their batches, and either goes on from the other's checkpoint.

They also share the heads of a block (tensor parallelism).

In float64: another order of sums then differs by its rounding alone, far below what another batch would do.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from tiny import in_subprocess, interrupted_at, metrics, options, read_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader

from train.__main__ import main
from train.data import TextData
from xpos_zoo import MultiHeadAttention

STEPS = 6
STRATEGIES: dict[str, list[str]] = {
    "ddp": ["--trainer.strategy=ddp"],
    "sharded": [
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
        "--trainer.strategy.save_distributed_checkpoint=false",
    ],
}


class BothRanks(TextData):
    """Gives one process the batches of two, joined."""

    def train_dataloader(self) -> DataLoader:
        loader: Any = super().train_dataloader()
        other: Any = super().train_dataloader()
        other.batch_sampler.rank = 1
        pairs = zip(loader.batch_sampler, other.batch_sampler, strict=True)
        return DataLoader(loader.dataset, batch_sampler=[[*ours, *theirs] for ours, theirs in pairs])


class Double(L.Callback):
    """Makes the model float64: sharding knows no precision of that name."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.double()


def command(tmp_path: Path, name: str, **changes: Any) -> list[str]:
    small: dict[str, Any] = {"trainer__max_steps": STEPS, "trainer__val_check_interval": 3}
    return ["fit", *options(tmp_path, name=name, **small, **changes), "--trainer.callbacks+=test_devices.Double"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_two_processes_train_as_one_does_on_both_their_batches(strategy, tmp_path):
    main(command(tmp_path, "one"), data=BothRanks)
    two = [*command(tmp_path, "two", trainer__devices=2), *strategy]
    stopped = in_subprocess("-m", "train", *two, *interrupted_at(5))
    assert "InterruptionError" in stopped.stderr
    runs = {name: tmp_path / "runs" / name / "seed1" for name in ("one", "two", "went_on")}
    assert read_checkpoint(runs["two"])["global_step"] == 3
    # One process goes on from the checkpoint of two, and two do, too.
    shutil.copytree(runs["two"], runs["went_on"], ignore=shutil.ignore_patterns("metrics", ".lock"))
    main(command(tmp_path, "went_on"), data=BothRanks)
    compiled = str(len(strategy) > 1).lower()  # for one of the strategies
    done = in_subprocess("-m", "train", *two, f"--model.compile={compiled}")
    assert done.returncode == 0, done.stderr
    expected = read_checkpoint(runs["one"])
    for name in ("two", "went_on"):
        found = read_checkpoint(runs[name])
        assert found["global_step"] == STEPS
        for part, weight in expected["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][part], weight, rtol=1e-9, atol=1e-12, msg=f"{name} {part}")
        validated = metrics(runs[name], "val_bits_per_byte")
        for step, loss in metrics(runs["one"], "val_bits_per_byte").items():
            if step in validated:  # those who went on have but what came after
                assert validated[step] == pytest.approx(loss, rel=1e-6)  # the log is written in float32
        assert validated


def shares_its_heads(rank: int, meeting: Path) -> None:
    """Two processes with half the heads of a block each compute what it does alone, and its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    alone = MultiHeadAttention(32, 4, num_kv_heads=2, block_size=8).double()
    shared = copy.deepcopy(alone)
    split, joined = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, ParallelStyle] = {"q_proj": split, "k_proj": split, "v_proj": split, "out_proj": joined}
    parallelize_module(shared, init_device_mesh("cpu", (2,)), plan)
    shared.num_kv_heads //= 2  # of its caches
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    expected = alone(x)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [x, *alone.parameters()], upstream)
    for call in (shared, torch.compile(shared, fullgraph=True, backend="aot_eager")):
        found = call(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        for mine, gradient in zip(
            torch.autograd.grad(found, [x, *shared.parameters()], upstream), gradients, strict=True
        ):
            whole = mine.full_tensor() if isinstance(mine, DTensor) else mine
            torch.testing.assert_close(whole, gradient, rtol=1e-12, atol=1e-13)
    cache = shared.make_cache(2)
    decoded = [shared(x[:, i : i + 1], cache=cache) for i in range(x.shape[1])]
    torch.testing.assert_close(torch.cat(decoded, dim=1), expected.detach(), rtol=1e-12, atol=1e-14)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_heads_of_a_block(tmp_path):
    spawn(shares_its_heads, (tmp_path / "meeting",), nprocs=2)
