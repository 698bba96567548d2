"""The thresholds of the extrapolation measure, fixed before any run: what is claimed, and whether it held."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from train.measured import Measured, in_lengths, interval

Line = tuple[str, str]  # an encoding in a mode
Judge = Callable[["Evidence"], tuple[bool | None, str]]  # whether the claim held, None if it only reports; the figure

WINDOWED = 0.02, 64  # nats above L, up to how many L
OPEN = 0.1, 32


@dataclass(frozen=True)
class Evidence:
    """What was measured, by encoding and mode; the documents of the windows; the trained length."""

    lines: dict[Line, Measured]
    documents: list[str]
    length: int

    def rise(self, line: Line, multiple: int) -> tuple[float, float, float]:
        """Mean paired difference of the loss at `multiple` trained lengths against that at L, and its interval."""
        losses = self.lines[line].losses
        return self._mean(losses[multiple * self.length] - losses[self.length])

    def difference(self, line: Line, other: Line, multiple: int, against_trained: bool) -> tuple[float, float, float]:
        """Mean paired difference of two lines at `multiple` L, of their rises over L if against_trained."""
        of = [
            losses[multiple * self.length] - against_trained * losses[self.length]
            for losses in (self.lines[line].losses, self.lines[other].losses)
        ]
        return self._mean(of[0] - of[1])

    def multiples(self, line: Line, reach: int) -> list[int]:
        """The contexts above L up to `reach` L, in trained lengths."""
        return [c // self.length for c in sorted(self.lines[line].losses) if self.length < c <= reach * self.length]

    def worst(self, line: Line, reach: int) -> tuple[tuple[float, float, float], int]:
        """The rise with the highest upper end of its interval, up to `reach` L, and where it is."""
        rises = [(self.rise(line, m), m) for m in self.multiples(line, reach)]
        return max(rises, key=lambda entry: entry[0][2])

    def _mean(self, differences: np.ndarray) -> tuple[float, float, float]:
        return float(differences.mean()), *interval(differences, self.documents)


@dataclass(frozen=True)
class Threshold:
    """A claim on some lines that can be told from contexts of `least` L, and is met only at `reach` L."""

    claim: str
    lines: tuple[Line, ...]
    least: int
    reach: int
    judge: Judge
    paired: bool = False  # whether the lines must have the same seeds

    def verdict(self, evidence: Evidence) -> str:
        for encoding, mode in self.lines:
            if (encoding, mode) not in evidence.lines:
                return f"not measured: {self.claim}: {encoding} {mode} is not in this matrix"
        longest = min(max(evidence.lines[line].losses) for line in self.lines)
        ends = f"contexts end at {in_lengths(longest, evidence.length)}"
        if longest < self.least * evidence.length:
            return f"not measured: {self.claim}: {ends}"
        seeds = [evidence.lines[line].seeds for line in self.lines]
        if self.paired and any(each != seeds[0] for each in seeds):
            return f"not measured: {self.claim}: the two have other seeds"
        met, figure = self.judge(evidence)
        if met is None:
            return f"reported, whichever way it falls: {self.claim}: {figure}"
        if met and longest < self.reach * evidence.length:
            return f"not measured: {self.claim}: {ends}, there {figure}"
        return f"{'met' if met else 'MISSED'}: {self.claim}: {figure}"


def nats(figures: tuple[float, float, float], digits: int = 3) -> str:
    mean, low, high = figures
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def collapse(evidence: Evidence) -> tuple[bool, str]:
    rise = evidence.rise(("RoPE", "dense"), 4)
    return rise[0] >= 1, nats(rise)


def dense(evidence: Evidence) -> tuple[bool, str]:
    rise = evidence.rise(("xPos", "dense"), 2)
    return rise[0] <= 0.05, nats(rise)


def flat(evidence: Evidence) -> tuple[bool, str]:
    bound, reach = WINDOWED
    rise, multiple = evidence.worst(("xPos", "BCA"), reach)
    return rise[2] <= bound, f"at most {nats(rise, 4)}, at {multiple} L"


def open_context(mode: str) -> Judge:
    def judge(evidence: Evidence) -> tuple[bool, str]:
        bound, reach = OPEN
        multiples = evidence.multiples(("xPos", mode), reach)
        worst = max((evidence.rise(("xPos", mode), m) for m in multiples), key=lambda rise: rise[0])
        rope = evidence.rise(("RoPE", mode), multiples[-1])
        collapsed = rope[0] > 1 or multiples[-1] < reach  # not asked before
        return worst[0] <= bound and collapsed, f"xPos at most {nats(worst)}, RoPE {nats(rope)}"

    return judge


def fair_win(evidence: Evidence) -> tuple[None, str]:
    return None, f"{nats(evidence.difference(('xPos', 'BCA'), ('RoPE', 'BCA'), 4, against_trained=True), 4)} nats"


def recompute(evidence: Evidence) -> tuple[bool, str]:
    lines = ("xPos", "BCA"), ("xPos", "recompute")
    multiples = evidence.multiples(lines[0], 64)
    found = [(evidence.difference(*lines, m, against_trained=False), m) for m in multiples]
    difference, multiple = max(found, key=lambda entry: entry[0][0])
    return difference[0] <= 0.01, f"at most {nats(difference, 4)}, at {multiple} L"


THRESHOLDS = [
    Threshold("collapse, RoPE dense at 4 L is at least 1 nat above L", (("RoPE", "dense"),), 4, 4, collapse),
    Threshold("xPos dense at 2 L is within 0.05 nats of L", (("xPos", "dense"),), 2, 2, dense),
    Threshold(
        "flat, xPos BCA is within +0.02 nats of L up to 64 L (upper end of the interval)",
        (("xPos", "BCA"),),
        2,
        WINDOWED[1],
        flat,
    ),
    *(
        Threshold(
            f"open context, with {name} xPos dense is within 0.1 nats of L up to 32 L, where RoPE is above 1 nat",
            (("xPos", mode), ("RoPE", mode)),
            2,
            OPEN[1],
            open_context(mode),
        )
        for name, mode in (("temperature", "temperature"), ("a soft tail", "tail"))
    ),
    Threshold(
        "fair win, from L to 4 L xPos BCA rises more than RoPE BCA by",
        (("xPos", "BCA"), ("RoPE", "BCA")),
        4,
        4,
        fair_win,
        paired=True,
    ),
    Threshold(
        "no worse than recompute, xPos BCA is up to 64 L within 0.01 nats of recomputing the last L at a stride of L/2",
        (("xPos", "BCA"), ("xPos", "recompute")),
        2,
        WINDOWED[1],
        recompute,
        paired=True,
    ),
]


def verdicts(evidence: Evidence) -> list[str]:
    """Every threshold: met or missed with its figure and 95 % interval, or why it is not measured."""
    return [threshold.verdict(evidence) for threshold in THRESHOLDS]
