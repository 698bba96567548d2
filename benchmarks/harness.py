"""Side-by-side timing: contenders take turns in one process, medians become ratios, a table and a JSON file."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "einops", "triton", "x-transformers", "torchscale", "rotary-embedding-torch")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def milliseconds(contenders: dict[str, Callable[[], Any]], device: str, seconds: float = 2.0) -> dict[str, float]:
    """The median time of a call of each contender, which take turns until each has had about `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():  # compile and warm up
        for _ in range(3):
            call()
    while min(sum(each) for each in times.values()) < seconds * 1000 or min(map(len, times.values())) < 5:
        for name, call in contenders.items():
            if sum(times[name]) > 4 * seconds * 1000 and len(times[name]) >= 5:
                continue  # the slowest need not wait for the fastest
            times[name].append(one_call(call, device))
    return {name: statistics.median(each) for name, each in times.items()}


def one_call(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1000


def publish(name: str, device: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write `results/<name>-<device>.json` with versions and hardware, and print the rows as a table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device}.json"
    content = {
        "benchmark": name,
        "hardware": hardware(device),
        "versions": {package: found for package in PACKAGES if (found := installed(package))},
        "settings": settings,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    heads = list(rows[0])
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" * len(heads))
    for row in rows:
        print("| " + " | ".join(f"{row[h]:.2f}" if isinstance(row[h], float) else str(row[h]) for h in heads) + " |")
    print(path)
