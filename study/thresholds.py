"""The thresholds of the extrapolation measure, fixed before any run: what is claimed, and whether it held."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from train.measure import Results, by_window, estimate, in_lengths

Line = tuple[str, str]  # an encoding in a mode
Figures = tuple[float, float, float]  # a mean and its 95 % interval


@dataclass(frozen=True)
class Evidence:
    """Losses by line and context in trained lengths: a row a seed, a column a window."""

    losses: dict[Line, dict[float, pd.DataFrame]]

    @classmethod
    def of(cls, results: Results) -> "Evidence":
        losses: dict[Line, dict[float, pd.DataFrame]] = {}
        for (encoding, mode, context), group in results.tables["loss"].groupby(["encoding", "mode", "context"]):
            losses.setdefault((encoding, mode), {})[context / results.length] = by_window(group)
        return cls(losses)

    def rise(self, line: Line, multiple: float) -> Figures:
        """From L to `multiple` L."""
        return estimate(self.losses[line][multiple] - self.losses[line][1])

    def multiples(self, line: Line, reach: int) -> list[float]:
        """The contexts above L up to `reach` L."""
        return [multiple for multiple in sorted(self.losses[line]) if 1 < multiple <= reach]


@dataclass(frozen=True)
class Threshold:
    """A claim on some lines that can be told from contexts of `least` L, and is met only at `reach` L.

    `judge` gives whether it held, None if it only reports, and the figure.
    """

    claim: str
    lines: tuple[Line, ...]
    least: int
    reach: int
    judge: Callable[[Evidence], tuple[bool | None, str]]

    def verdict(self, evidence: Evidence) -> str:
        for line in self.lines:
            if line not in evidence.losses:
                return f"not measured: {self.claim}: {' '.join(line)} is not in this matrix"
        losses = [evidence.losses[line] for line in self.lines]
        if any(not each[1].index.equals(losses[0][1].index) for each in losses):
            return f"not measured: {self.claim}: the two have other seeds"
        longest = min(map(max, losses))
        ends = f"contexts end at {in_lengths(int(4 * longest), 4)}"
        if longest < self.least:
            return f"not measured: {self.claim}: {ends}"
        met, figure = self.judge(evidence)
        if met is None:
            return f"reported, whichever way it falls: {self.claim}: {figure}"
        if met and longest < self.reach:
            return f"not measured: {self.claim}: {ends}, there {figure}"
        return f"{'met' if met else 'MISSED'}: {self.claim}: {figure}"


def nats(figures: Figures, digits: int = 3) -> str:
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*figures, d=digits)


def collapse(evidence: Evidence) -> tuple[bool, str]:
    rise = evidence.rise(("RoPE", "dense"), 4)
    return rise[0] >= 1, nats(rise)


def dense(evidence: Evidence) -> tuple[bool, str]:
    rise = evidence.rise(("xPos", "dense"), 2)
    return rise[0] <= 0.05, nats(rise)


def flat(evidence: Evidence) -> tuple[bool, str]:
    line = ("xPos", "BCA")
    rises = {multiple: evidence.rise(line, multiple) for multiple in evidence.multiples(line, 64)}
    worst = max(rises, key=lambda multiple: rises[multiple][2])
    return rises[worst][2] <= 0.02, f"at most {nats(rises[worst], 4)}, at {worst:g} L"


def open_context(mode: str) -> Callable[[Evidence], tuple[bool, str]]:
    def judge(evidence: Evidence) -> tuple[bool, str]:
        multiples = evidence.multiples(("xPos", mode), 32)
        worst = max(evidence.rise(("xPos", mode), multiple) for multiple in multiples)
        rope = evidence.rise(("RoPE", mode), multiples[-1])
        collapsed = rope[0] > 1 or multiples[-1] < 32  # not asked before
        return worst[0] <= 0.1 and collapsed, f"xPos at most {nats(worst)}, RoPE {nats(rope)}"

    return judge


def fair_win(evidence: Evidence) -> tuple[None, str]:
    xpos, rope = ((losses[4] - losses[1]) for losses in (evidence.losses[name, "BCA"] for name in ("xPos", "RoPE")))
    return None, f"{nats(estimate(xpos - rope), 4)} nats"


def recompute(evidence: Evidence) -> tuple[bool, str]:
    ours, theirs = (evidence.losses["xPos", mode] for mode in ("BCA", "recompute"))
    found = {m: estimate(ours[m] - theirs[m]) for m in evidence.multiples(("xPos", "BCA"), 64)}
    worst = max(found, key=lambda multiple: found[multiple][0])
    return found[worst][0] <= 0.01, f"at most {nats(found[worst], 4)}, at {worst:g} L"


THRESHOLDS = [
    Threshold("collapse, RoPE dense at 4 L is at least 1 nat above L", (("RoPE", "dense"),), 4, 4, collapse),
    Threshold("xPos dense at 2 L is within 0.05 nats of L", (("xPos", "dense"),), 2, 2, dense),
    Threshold(
        "flat, xPos BCA is within +0.02 nats of L up to 64 L (upper end of the interval)",
        (("xPos", "BCA"),),
        2,
        64,
        flat,
    ),
    *(
        Threshold(
            f"open context, with {name} xPos dense is within 0.1 nats of L up to 32 L, where RoPE is above 1 nat",
            (("xPos", mode), ("RoPE", mode)),
            2,
            32,
            open_context(mode),
        )
        for name, mode in (("log-n scaling", "log-n"), ("a soft tail", "tail"))
    ),
    Threshold(
        "fair win, from L to 4 L xPos BCA rises more than RoPE BCA by",
        (("xPos", "BCA"), ("RoPE", "BCA")),
        4,
        4,
        fair_win,
    ),
    Threshold(
        "no worse than recompute, xPos BCA is up to 64 L within 0.01 nats of recomputing the last L at a stride of L/2",
        (("xPos", "BCA"), ("xPos", "recompute")),
        2,
        64,
        recompute,
    ),
]


def verdicts(results: Results) -> list[str]:
    """Every threshold: met or missed with its figure and 95 % interval, or why it is not measured."""
    evidence = Evidence.of(results)
    return [threshold.verdict(evidence) for threshold in THRESHOLDS]
