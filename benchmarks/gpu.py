"""`python -m benchmarks.gpu --minutes 9`: all that waits for a GPU, most valuable first; called again, it goes on.

Each part is a process of its own with a bound on its time. How it ended is kept in results/gpu.json as it comes, and
what it measured beside it: a part that is done is not run again; one that failed or was cut short stops no other, and
is tried again after those that were not (the study then goes on, others begin anew). At the end docs/performance.md
gets the tables, and a table of parts is printed. `--toy` runs all on a CPU but what takes minutes there, launches and
the study, in sizes that mean nothing.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import RESULTS, table

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(?<=<!-- benchmark: )([\w-]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


class Part(NamedTuple):
    """What runs (`python -m ...`), in at most how many minutes, and with which options in place of these as a toy."""

    minutes: float
    module: str
    options: str
    toy: str


STUDY = "--size {} --output runs/study-gpu --results runs/study-gpu/results"
PARTS = {
    "tests": Part(6, "pytest", "-m gpu -q", "-m gpu -q tests/test_attention.py"),
    "launches": Part(3, "benchmarks.launches", "--device cuda", "--help"),
    "rotation": Part(
        8,
        "benchmarks.rotary",
        "--device cuda --seconds 0.2 --dtypes bfloat16 --lengths 4096 16384",
        "--seconds 0 --dtypes bfloat16 --lengths 8",
    ),
    "block": Part(
        6,
        "benchmarks.attention",
        "--device cuda --dtype bfloat16 --seconds 0.3 --lengths 1024 4096 16384 65536 --dense-limit 65536",
        "--dtype bfloat16 --seconds 0 --lengths 8 --dense-limit 8",
    ),
    "blockwise": Part(
        6,
        "benchmarks.blockwise",
        "--device cuda --dtype bfloat16 --seconds 0.3 --dense-limit 65536",
        "--seconds 0 --lengths 1024",
    ),
    "decoding": Part(
        5, "benchmarks.decode", "--device cuda --dtype bfloat16 --seconds 0.3", "--seconds 0 --positions 8"
    ),
    "memory": Part(
        5,
        "benchmarks.attention",
        "--device cuda --dtype bfloat16 --seconds 0.1 --lengths 131072 1048576 --dense-limit 0",
        "--dtype bfloat16 --seconds 0 --lengths 8 --dense-limit 0",
    ),
    "training": Part(
        6,
        "benchmarks.train",
        "--device cuda --size 124M --precision bf16-mixed --rounds 3 --steps 30",
        "--rounds 1 --steps 8",
    ),
    "rotation in float32": Part(
        8,
        "benchmarks.rotary",
        "--device cuda --seconds 0.2 --dtypes float32 --lengths 4096 16384",
        "--seconds 0 --dtypes float32 --lengths 8",
    ),
    "study": Part(60, "study", STUDY.format("gpu"), "--help"),
}


def run(name: str, part: Part, seconds: float, toy: bool, results: Path) -> dict[str, Any]:
    """How the part ended: done, failed or cut short; in how many seconds; and the last that it said."""
    command = [sys.executable, "-m", part.module, *shlex.split(part.toy if toy else part.options)]
    print(f"\n{name}: python -m {' '.join(command[2:])}, at most {seconds:.0f} s", flush=True)
    environment = os.environ | {"BENCHMARK_RESULTS": str(results)}
    if toy and part.module != "benchmarks.decode":  # which asks for one graph
        environment["TORCH_COMPILE_DISABLE"] = "1"
    log, begun = results / f"gpu-{name.replace(' ', '-')}.log", time.monotonic()
    with log.open("w") as output:
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=seconds)
            how = "done" if code.returncode == 0 else f"failed ({code.returncode})"
        except subprocess.TimeoutExpired:
            how = "cut short"
    last = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-12:]
    print("\n".join(last), flush=True)
    return {"how": how, "seconds": round(time.monotonic() - begun), "last": last[-1:]}


def run_all(parts: dict[str, Part], minutes: float, toy: bool, results: Path) -> list[dict[str, Any]]:
    """Run what is not done, each part within its own time and all within `minutes`; how each ended, as a row."""
    path, end = results / "gpu.json", time.monotonic() + 60 * minutes
    results.mkdir(parents=True, exist_ok=True)
    ended: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    waiting = [name for name in parts if ended.get(name, {}).get("how") != "done"]
    for name in sorted(waiting, key=lambda name: name in ended and parts[name].module != "study"):
        if (left := end - time.monotonic()) <= 0:
            break
        ended[name] = run(name, parts[name], min(60 * parts[name].minutes, left), toy, results)
        path.write_text(json.dumps(ended, indent=1) + "\n")
    return [{"part": name} | ended.get(name, {"how": "waiting"}) for name in parts]


def filled(text: str, results: Path = RESULTS) -> str:
    """A document with the tables of `results/<name>-cuda.json` in their places, "not measured" where there is none."""

    def replacement(match: re.Match[str]) -> str:
        path = results / f"{match[1]}-cuda.json"
        content = json.loads(path.read_text()) if path.exists() else None
        made = f"{content['hardware']}:\n\n{table(content['rows'])}" if content else "not measured"
        return f"{match[1]} -->\n{made}\n"

    return MARKED.sub(replacement, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", default=9.0, type=float, help="for this call")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="some of the parts")
    parser.add_argument("--paths", help="text to train the study's models on, as `python -m study` takes it")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--results", type=Path, help="by default benchmarks/results, or runs/gpu-toy")
    options = parser.parse_args()
    if not (options.toy or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device, and all tests would be skipped; --toy runs without one")
    parts = {name: part for name, part in PARTS.items() if not options.only or name in options.only}
    if options.paths and "study" in parts:
        study = parts["study"]
        parts["study"] = study._replace(options=f"{study.options} --paths {shlex.quote(options.paths)}")
    results = options.results or (ROOT / "runs" / "gpu-toy" if options.toy else RESULTS)
    rows = run_all(parts, options.minutes, options.toy, results.resolve())
    if results == RESULTS:
        document = ROOT / "docs" / "performance.md"
        document.write_text(filled(document.read_text()))
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
