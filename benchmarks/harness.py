"""Side-by-side timing: contenders take turns in one process, medians become ratios, a table and a JSON file."""

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
PACKAGES = (
    "torch einops lightning triton torchscale zetascale rotary-embedding-torch x-transformers transformers liger-kernel"
)
AHEAD = 5_000_000  # cycles, some milliseconds, in which the host gets ahead of the GPU: else its time is measured

Call = Callable[[], Any]


def milliseconds(contenders: dict[str, Call], device: str, seconds: float = 2.0) -> dict[str, float]:
    """The median time of a call of each contender; they take turns until each has had about `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():  # compile and warm up
        for _ in range(10):
            call()

    def done(name: str, share: float = 1.0) -> bool:
        return len(times[name]) >= 5 and sum(times[name]) >= share * seconds * 1000

    while not all(map(done, times)):
        for name, call in contenders.items():
            if not done(name, share=3.0):  # the slowest need not wait for the fastest
                times[name].append(one_call(call, device))
    return {name: statistics.median(each) for name, each in times.items()}


def one_call(call: Call, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1000


def peak_megabytes(call: Call, device: str) -> float | None:
    """How much memory a call takes at its peak beyond what is taken before; None where that cannot be told."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call is served from what earlier ones have left
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except (OSError, AttributeError):
        return None

    def kilobytes(entry: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
        return int(line.split()[1])

    before = kilobytes("VmRSS")
    call()
    return max(0, kilobytes("VmHWM") - before) / 1024


def training(forward: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """Forward and backward, as a call: gradients of the inputs and of all that the forward uses."""
    upstream: list[Tensor] = []

    def call() -> None:
        output = forward(*inputs)
        if not upstream:
            upstream.append(torch.randn_like(output))
        output.backward(upstream[0])
        for t in inputs:
            t.grad = None

    return call


def peers(makers: dict[str, Callable[[], Call]], failure: type[Exception] = ImportError) -> dict[str, Call]:
    """Those contenders that can be made here; of the others, whose making is a `failure`, a line says why not."""
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except failure as error:
            why = "not installed" if isinstance(error, ImportError) else type(error).__name__
            print(f"{name}: {why} ({str(error).splitlines()[0]})")
    return made


def publish(name: str, device: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table, and `record` them."""
    path = record(name, device, settings, rows)
    print(table(rows))
    print(path)


def record(name: str, device: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write `results/<name>-<device>.json`, with versions and hardware; the rows so far, if a run is cut short."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    content = {
        "benchmark": name,
        "hardware": hardware,
        "versions": {package: found for package in PACKAGES.split() if (found := installed(package))},
        "settings": settings,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        lines.append([f"{e:.2f}" if isinstance(e := row.get(head, ""), float) else str(e) for head in heads])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
