"""Processes train what one would on all their batches, or on the windows that they share, and go on from each other.

In float64: another order of sums then differs by its rounding alone, far below what another batch would do.
"""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from tiny import in_subprocess, interrupted_at, metrics, options, read_checkpoint, write_corpus
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader

from train.__main__ import main
from train.data import TextData

STEPS = 6
DDP = ("--trainer.strategy=ddp",)


def sharded(devices: int) -> tuple[str, ...]:
    """Over all devices, whether they share windows or not."""
    strategy = "--trainer.strategy"
    name = f"{strategy}=lightning.pytorch.strategies.ModelParallelStrategy"
    sizes = f"{strategy}.data_parallel_size={devices}", f"{strategy}.tensor_parallel_size=1"
    return name, *sizes, f"{strategy}.save_distributed_checkpoint=false"


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
    return ["fit", *options(tmp_path, name=name, **small | changes), "--trainer.callbacks+=test_devices.Double"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, sharded(2)], ids=["ddp", "sharded"])
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
    # For one of the strategies; before torch 2.13 a compiled backward of float64 attention on a CPU mixes its types.
    compiled = len(strategy) > 1 and not torch.__version__.startswith(("2.11", "2.12"))
    done = in_subprocess("-m", "train", *two, f"--model.compile={str(compiled).lower()}")
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


def train(folder: Path, name: str, devices: int = 1, sharing: int = 1, strategy: Any = (), **more: Any) -> None:
    """Twenty steps with windows that most often have several documents, cut over so many devices."""
    changes: dict[str, Any] = {"data__context_length": 32, "data__separate_documents": "true"}
    changes |= {"trainer__max_steps": 20, "trainer__val_check_interval": 10}
    changes |= {"model__num_layers": 2, "model__block_size": "[4, 8]", "model__context_parallel_size": sharing} | more
    args = [*command(folder, name, trainer__devices=devices, **changes), *strategy]
    main(args, data=BothRanks if name.endswith("on both batches") else TextData)


# Devices, of which so many share a window, and how.
TRAININGS = {"two": (2, 2, DDP), "four": (4, 4, DDP), "pairs": (4, 2, sharded(4))}


def train_together(rank: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for port, (name, (devices, *how)) in zip(ports, TRAININGS.items(), strict=True):
        if rank < devices:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            train(folder, name, devices, *how)
            dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_devices_that_share_windows_train_as_one_does_and_one_goes_on_from_four(tmp_path):
    write_corpus(tmp_path / "corpus", size=40)
    for name in ("one", "one on both batches"):  # which makes the cache of tokens, too
        train(tmp_path, name)
    spawn(train_together, (tmp_path, [free_port() for _ in TRAININGS]), nprocs=4)
    runs = {name: tmp_path / "runs" / name / "seed1" for name in ("one", "one on both batches", *TRAININGS)}
    for name, (devices, sharing, _) in TRAININGS.items():
        expected = runs["one" if devices == sharing else "one on both batches"]
        for part, weight in read_checkpoint(expected)["state_dict"].items():
            torch.testing.assert_close(read_checkpoint(runs[name])["state_dict"][part], weight, rtol=1e-9, atol=1e-12)
        for column in ("train_nats_per_token", "val_nats_per_token"):
            losses = metrics(expected, column)
            assert len(losses) == (20 if column.startswith("train") else 2)
            if devices == sharing or column.startswith("val"):  # else the one logs a mean over more
                assert metrics(runs[name], column) == pytest.approx(losses, rel=1e-6)  # the log is written in float32
    train(tmp_path, "longer", trainer__max_steps=21, checkpoint=runs["four"])
    assert read_checkpoint(tmp_path / "runs" / "longer" / "seed1")["global_step"] == 21
