"""What an extrapolation measurement found, gathered by encoding and mode, and how sure of it one can be."""

from typing import Any

import numpy as np

REPLICATES = 2000


class Measured:
    """Losses of an encoding in a mode: (runs, windows) at every context, and at every position of the longest."""

    def __init__(self, cells: list[dict[str, Any]]):
        cells = sorted(cells, key=lambda cell: cell["seed"])  # so that two encodings' runs pair up
        self.encoding, self.mode = cells[0]["encoding"], cells[0]["mode"]
        self.name = f"{self.encoding}, {cells[0]['label']}"
        self.seeds = [cell["seed"] for cell in cells]
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


def in_lengths(context: int, length: int) -> str:
    if context >= length:
        return f"{context // length} L" if context > length else "L"
    return f"L/{length // context}"
