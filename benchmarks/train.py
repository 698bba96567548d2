"""`python -m benchmarks.train --device cpu`: what Lightning and configs/long.yaml cost, and FLOP utilisation.

A Lightning trainer and a bare PyTorch loop with plain xPos, and the bare loop with the recipe of configs/long.yaml: the
same sizes, batches, optimizer and schedule. They take turns for rounds of steps, and median times of a step are
compared. On a CPU only the ratios mean anything; on a GPU also the rate of operations, as a share of what a large
matrix product of the same dtype reaches in the same run.
"""

import argparse
import contextlib
import logging
import statistics
import time
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.harness import milliseconds, publish, record
from train.callbacks import training_flops
from train.language_model import LanguageModel
from xpos_zoo import XPOS

SIZES: dict[str, tuple[int, int, dict[str, Any]]] = {  # context length, batch size, model
    "demo": (128, 16, {"embed_dim": 128, "num_layers": 4, "num_heads": 4}),
    "demo-1024": (1024, 2, {"embed_dim": 128, "num_layers": 4, "num_heads": 4}),
    "124M": (1024, 16, {"embed_dim": 768, "num_layers": 16, "num_heads": 12}),
}


class StepTimes(L.Callback):
    """Milliseconds from the end of one step to the end of the next."""

    def __init__(self, device: str):
        self.device, self.ends = device, []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def milliseconds(self) -> list[float]:
        return [(b - a) * 1000 for a, b in zip(self.ends, self.ends[1:], strict=False)]


def lightning_round(module: LanguageModel, data: DataLoader, precision: Any, device: str) -> list[float]:
    times = StepTimes(device)
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_steps=len(data),
        gradient_clip_val=1.0,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return times.milliseconds


def bare_round(module: LanguageModel, data: DataLoader, precision: Any, device: str) -> list[float]:
    module.to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=module.options.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    ends = StepTimes(device)
    for batch in data:
        with autocast:
            loss = cross_entropy(*module.predictions(batch.to(device, non_blocking=True)))
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ends.on_train_batch_end()
    return ends.milliseconds


def matrix_product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of an 8192^3 matrix product."""
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    return 2 * 8192**3 / (milliseconds({"product": lambda: a @ b}, "cuda")["product"] / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="demo", choices=list(SIZES))
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--rounds", default=6, type=int)
    parser.add_argument("--steps", default=60, type=int, help="steps a round")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    length, batch, model = SIZES[options.size]
    torch.manual_seed(0)
    make = partial(LanguageModel, length, **model, compile=options.device == "cuda", warmup_steps=1)
    plain, recipe = make(), make(partial(XPOS, max_wavelength=length), distance_bias={"name": "ScaleInvariant"})
    for module in (plain, recipe):
        module.configure_model()
    contenders = {
        "lightning": (lightning_round, plain),
        "bare": (bare_round, plain),
        "bare, configs/long.yaml": (bare_round, recipe),
    }
    windows = torch.randint(256, (batch * options.steps, length + 1))
    data = DataLoader(windows, batch_size=batch)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    settings = {"batch_size": batch, "context_length": length, **model}
    row: dict[str, Any] = {"size": options.size, "precision": options.precision}
    for rounds in range(1, options.rounds + 1):
        for name, (one_round, module) in contenders.items():
            times[name] += one_round(module, data, options.precision, options.device)[5:]
            print(name, f"{statistics.median(times[name]):.2f} ms a step", flush=True)
        step = {name: statistics.median(each) for name, each in times.items()}
        row["rounds"], row["lightning / bare"] = rounds, step["lightning"] / step["bare"]
        row["configs/long.yaml / xPos, bare"] = step["bare, configs/long.yaml"] / step["bare"]
        if options.device == "cuda":
            rate = batch * length * training_flops(plain.transformer, length) / (step["lightning"] / 1000)
            reached = matrix_product_rate(torch.bfloat16 if options.precision == "bf16-mixed" else torch.float32)
            row["tokens a second"] = batch * length / (step["lightning"] / 1000)
            row["share of the matrix product's rate"] = rate / reached
        record(f"train-{options.size}", options.device, settings, [row])
    publish(f"train-{options.size}", options.device, settings, [row])


if __name__ == "__main__":
    main()
