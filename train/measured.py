"""What an extrapolation measurement found, gathered by encoding and mode, and how sure of it one can be."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

REPLICATES = 2000


class Line:
    """The cells of an encoding in a mode, by seed: what a row of a table or a line of a plot is made of."""

    def __init__(self, cells: list[dict[str, Any]]):
        self.cells = sorted(cells, key=lambda cell: cell["seed"])  # so that two encodings' runs pair up
        self.encoding, self.mode, self.label = (cells[0][name] for name in ("encoding", "mode", "label"))
        self.name = f"{self.encoding}, {self.label}"
        self.seeds = [cell["seed"] for cell in self.cells]


L = TypeVar("L", bound=Line)


def gathered(cells: list[dict[str, Any]], kind: Callable[[list[dict[str, Any]]], L]) -> list[L]:
    """A line for each encoding in each mode, in the order of the cells."""
    by_key: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        by_key.setdefault((cell["encoding"], cell["mode"]), []).append(cell)
    return [kind(each) for each in by_key.values()]


def seeds_of(lines: Sequence[Line]) -> str:
    """In words, such as "seeds 1, 2"."""
    seeds = sorted({seed for line in lines for seed in line.seeds})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def on_intervals(lines: Sequence[Line]) -> str:
    """What is to be said of bootstrap intervals."""
    one = len({seed for line in lines for seed in line.seeds}) == 1
    warning = " With one seed they say nothing about another training." if one else ""
    return f"Intervals: bootstrap over seeds, then documents.{warning}"


class Measured(Line):
    """Losses of an encoding in a mode: (runs, windows) at every context, and at every position of the longest."""

    def __init__(self, cells: list[dict[str, Any]]):
        super().__init__(cells)
        cells = self.cells
        self.losses = by_context([cell["losses"] for cell in cells])
        self.chunked = by_context([cell.get("chunked", {}) for cell in cells])  # empty in modes without
        self.by_position = np.array([cell["by_position"] for cell in cells]).mean(0)

    def mean(self, context: int) -> float:
        return float(self.losses[context].mean())


def by_context(cells: list[dict[Any, list[float]]]) -> dict[int, np.ndarray]:
    """(runs, windows) for each context, whose numbers JSON turns into strings."""
    cells = [{int(context): losses for context, losses in cell.items()} for cell in cells]
    return {context: np.array([cell[context] for cell in cells]) for context in cells[0]}


def interval(differences: np.ndarray, documents: list[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `differences` (runs, windows): resamples runs, then whole documents."""
    names = sorted(set(documents))
    member = np.array([[name == document for document in documents] for name in names], dtype=float)
    sums, counts = differences @ member.T, member.sum(1)
    rng = np.random.default_rng(0)
    runs = rng.integers(len(differences), size=(REPLICATES, len(differences), 1))
    chosen = rng.integers(len(names), size=(REPLICATES, 1, len(names)))
    means = sums[runs, chosen].sum((1, 2)) / (len(differences) * counts[chosen].sum((1, 2)))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def octaves(length: int, longest: int) -> list[int]:
    """L/4, L/2, L, 2 L, ... up to longest * L."""
    return [length * 2**k // 4 for k in range(int(math.log2(longest)) + 3)]


def in_lengths(context: int, length: int) -> str:
    if context >= length:
        return f"{context // length} L" if context > length else "L"
    return f"L/{length // context}"
