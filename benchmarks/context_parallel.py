"""`python -m benchmarks.context_parallel`: what a rank holds and sends when a row is cut over 1 to 8 ranks.

One attention block, blockwise or `--dense`, forward and backward, float32, processes on this machine's CPU with gloo.
Memory is the peak beyond what was held before, of the rank that had most. Bytes are those that came in through the
loopback interface, each way: of blocks per message between two ranks, of dense attention per rank. Nothing is timed.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from benchmarks.harness import peak_megabytes, publish
from xpos_zoo import MultiHeadAttention

RANKS, WIDTH, HEADS, GROUPS, BLOCK = 8, 256, 4, 2, 256


def received() -> int:
    """Bytes through the loopback interface so far."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def measure(rank: int, length: int, dense: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    block = MultiHeadAttention(WIDTH, HEADS, num_kv_heads=GROUPS, block_size=None if dense else BLOCK)
    rows: list[dict[str, Any]] = []
    for ranks in (1, 2, 4, 8):
        block.cp_mesh = init_device_mesh("cpu", (RANKS // ranks, ranks), mesh_dim_names=("dp", "cp"))["cp"]
        own = torch.randn(1, length // ranks, WIDTH)

        def call(x: torch.Tensor = own) -> None:
            block(x).sum().backward()

        if rank < ranks:
            call(own[:, :BLOCK])  # warms up, and connects
        dist.barrier()
        before = received()
        peak = torch.tensor(peak_megabytes(call, "cpu") or 0.0 if rank < ranks else 0.0)
        dist.barrier()
        senders = max(1, ranks if dense else ranks - 1)
        each_way = (received() - before) / (2 * senders)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        tokens = length * (ranks - 1) // ranks if dense else BLOCK * (ranks > 1)
        formula = 2 * tokens * GROUPS * (WIDTH // HEADS) * 4
        row = {"ranks": ranks, "tokens a rank": length // ranks, "peak, MB": peak.item()}
        row |= {"of one rank's": peak.item() / rows[0]["peak, MB"] if rows else 1.0}
        rows.append(row | {"KB each way": each_way / 1024, "KB, formula": formula / 1024})
    if rank == 0:
        settings = {"length": length, "embed_dim": WIDTH, "heads": HEADS, "kv_heads": GROUPS}
        settings |= {"block_size": block.block_size}
        publish("context-parallel-dense" if dense else "context-parallel", "cpu", settings, rows)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context_parallel", description=__doc__)
    parser.add_argument("--length", default=16384, type=int, help="tokens of the row, a multiple of 8 blocks")
    parser.add_argument("--dense", action="store_true", help="dense attention in place of blocks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (options.length, options.dense, folder), nprocs=RANKS)


if __name__ == "__main__":
    main()
