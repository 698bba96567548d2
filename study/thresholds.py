"""The thresholds of the extrapolation measure, fixed before any run: what is claimed, and whether it held.

The learning rate's schedule for recall, and the discount, are younger than they are, each chosen by two of five seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from operator import attrgetter
from typing import NamedTuple

import pandas as pd

from study.recipes import DISCOUNT, P_ROPE, PARTIAL
from train.measure import Estimate, Results, by_window, estimate, in_lengths

Line = tuple[str, str]  # an encoding in a mode
Losses = dict[Line, dict[float, pd.DataFrame]]  # `by_window`, by context in trained lengths
mean, upper = attrgetter("mean"), attrgetter("high")  # of an estimate
Judge = Callable[[Losses], tuple[bool | None, str]]  # whether the claim held, None if it only reports; the figure


class Threshold(NamedTuple):
    """A claim on some lines that can be told from contexts of `least` L, and is met only at `reach` L."""

    claim: str
    lines: tuple[Line, ...]
    least: int
    reach: int
    judge: Judge

    def verdict(self, losses: Losses) -> str:
        if lacking := [" ".join(line) for line in self.lines if line not in losses]:
            return f"not measured: {self.claim}: {lacking[0]} is not in this matrix"
        lines = [losses[line] for line in self.lines]
        if any(not each[1].index.equals(lines[0][1].index) for each in lines):
            return f"not measured: {self.claim}: the two have other seeds"
        longest = min(map(max, lines))
        ends = f"contexts end at {in_lengths(int(4 * longest), 4)}"
        if longest < self.least:
            return f"not measured: {self.claim}: {ends}"
        met, figure = self.judge(losses)
        if met is None:
            return f"reported, whichever way it falls: {self.claim}: {figure}"
        if met and longest < self.reach:
            return f"not measured: {self.claim}: {ends}, there {figure}"
        return f"{'met' if met else 'MISSED'}: {self.claim}: {figure}"


def nats(figures: Estimate, digits: int = 3) -> str:
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*figures, d=digits)


def rises(losses: Losses, line: Line, reach: int = 64) -> dict[float, Estimate]:
    """From L to each context above it, up to `reach` L."""
    of = losses[line]
    return {multiple: estimate(of[multiple] - of[1]) for multiple in sorted(of) if 1 < multiple <= reach}


def highest(found: dict[float, Estimate], part: Callable[[Estimate], float]) -> tuple[float, str]:
    """The highest mean or upper end of all contexts, and where it is."""
    multiple = max(found, key=lambda multiple: part(found[multiple]))
    return part(found[multiple]), f"at most {nats(found[multiple], 4)}, at {multiple:g} L"


def in_words(found: dict[str, Estimate]) -> str:
    return ", ".join(f"{nats(figures, 4)} {name}" for name, figures in found.items())


def below(found: dict[str, Estimate]) -> tuple[bool, str]:
    """Whether all are below 0 with their whole intervals."""
    return all(figures.high < 0 for figures in found.values()), in_words(found)


def rise_at(line: Line, multiple: int, holds: Callable[[float], bool]) -> Judge:
    def judge(losses: Losses) -> tuple[bool, str]:
        rise = rises(losses, line, multiple)[multiple]
        return holds(rise.mean), nats(rise)

    return judge


def flat(losses: Losses) -> tuple[bool, str]:
    rise, told = highest(rises(losses, BCA), upper)
    return rise <= 0.02, told


def open_context(mode: str, losses: Losses) -> tuple[bool, str]:
    xpos, rope = (rises(losses, (encoding, mode), 32) for encoding in ("xPos", "RoPE"))
    worst, farthest = max(xpos.values()), max(xpos)
    collapsed = rope[farthest].mean > 1 or farthest < 32  # not asked before
    return worst.mean <= 0.1 and collapsed, f"xPos at most {nats(worst)}, RoPE {nats(rope[farthest])}"


def fair_win(losses: Losses) -> tuple[None, str]:
    xpos, rope = (losses[encoding, "BCA"] for encoding in ("xPos", "RoPE"))
    return None, f"{nats(estimate(xpos[4] - xpos[1] - (rope[4] - rope[1])), 4)} nats"


def recompute(losses: Losses) -> tuple[bool, str]:
    ours, theirs = losses[BCA], losses[RECOMPUTE]
    worst, told = highest({m: estimate(ours[m] - theirs[m]) for m in sorted(ours) if 1 < m <= 64}, mean)
    return worst <= 0.01, told


def stays(mode: str, losses: Losses) -> tuple[bool, str]:
    (near, told), (far, told_far) = (highest(rises(losses, (PARTIAL, mode), reach), upper) for reach in (16, 64))
    return near <= 0.01 and far <= 0.02, "; ".join(dict.fromkeys((told, told_far)))


def lower_at_length(losses: Losses) -> tuple[bool, str]:
    return below({f"of {other[0]}": estimate(losses[OURS][1] - losses[other][1]) for other in (ROPE, XPOS)})


def helps(mode: str, losses: Losses) -> tuple[bool, str]:
    ours = losses[PARTIAL, mode]
    return below({f"at {multiple} L": estimate(ours[multiple] - ours[1]) for multiple in (2, 8)})


def decay(losses: Losses) -> tuple[None, str]:
    ours, theirs = losses[OURS], losses[P_ROPE, "dense"]
    at = {"nats at L": 1, "nats at 8 L": 8, "nats at 64 L": 64}
    return None, in_words({name: estimate(ours[multiple] - theirs[multiple]) for name, multiple in at.items()})


XPOS, ROPE, BCA, RECOMPUTE = ("xPos", "dense"), ("RoPE", "dense"), ("xPos", "BCA"), ("xPos", "recompute")
OPEN = "open context, with {} xPos dense is within 0.1 nats of L up to 32 L, where RoPE is above 1 nat"
FLAT = "flat, xPos BCA is within +0.02 nats of L up to 64 L (upper end of the interval)"
FAIR = "fair win, from L to 4 L xPos BCA rises more than RoPE BCA by"
NO_WORSE = (
    "no worse than recompute, xPos BCA is up to 64 L within 0.01 nats of recomputing the last L at a stride of L/2"
)
COLLAPSE = "collapse, RoPE dense at 4 L is at least 1 nat above L"
THRESHOLDS = [
    Threshold(COLLAPSE, (ROPE,), 4, 4, rise_at(ROPE, 4, lambda x: x >= 1)),
    Threshold("xPos dense at 2 L is within 0.05 nats of L", (XPOS,), 2, 2, rise_at(XPOS, 2, lambda x: x <= 0.05)),
    Threshold(FLAT, (BCA,), 2, 64, flat),
    *(
        Threshold(OPEN.format(name), (("xPos", mode), ("RoPE", mode)), 2, 32, partial(open_context, mode))
        for name, mode in (("log-n scaling", "log-n"), ("a soft tail", "tail"))
    ),
    Threshold(FAIR, (BCA, ("RoPE", "BCA")), 4, 4, fair_win),
    Threshold(NO_WORSE, (BCA, RECOMPUTE), 2, 64, recompute),
]

CALLED = {"dense": PARTIAL, "discount": f"{PARTIAL}, discount {DISCOUNT:g}"}  # by mode: as trained, and what came last
STAYS = "loss, {} is within +0.01 nats of L up to 16 L, +0.02 to 64 L (upper end)"
LOWER = f"loss at L, {PARTIAL} is below RoPE and xPos (whole interval)"
HELPS = "gain, {} is at 2 L and at 8 L below L (whole interval)"
OURS = (PARTIAL, "dense")
LONG_THRESHOLDS = [
    *(Threshold(STAYS.format(name), ((PARTIAL, mode),), 2, 64, partial(stays, mode)) for mode, name in CALLED.items()),
    Threshold(LOWER, (OURS, ROPE, XPOS), 1, 1, lower_at_length),
    *(Threshold(HELPS.format(name), ((PARTIAL, mode),), 8, 8, partial(helps, mode)) for mode, name in CALLED.items()),
    Threshold(f"decay, {PARTIAL} less {P_ROPE}", (OURS, (P_ROPE, "dense")), 64, 64, decay),
]
RECALLED = {8: 99, 32: 95, 64: 95}  # per cent at least, of the worst seed, by distance in trained lengths
RECALLED_IN_TWO_LOOKS = {4: 90}  # of the seeds that learned to at L


def verdicts(results: Results, thresholds: Sequence[Threshold] = tuple(THRESHOLDS)) -> list[str]:
    """Every threshold: met or missed with its figure and 95 % interval, or why it is not measured."""
    losses: Losses = {}
    for (encoding, mode, context), group in results.tables["loss"].groupby(["encoding", "mode", "context"]):
        losses.setdefault((encoding, mode), {})[context / results.length] = by_window(group)
    return [threshold.verdict(losses) for threshold in thresholds]


def recall_verdicts(results: Results, recalled: dict[int, int] = RECALLED) -> list[str]:
    """For each distance that has a threshold, the worst seed of the recommended recipe."""
    found = []
    for (mode, name), (multiple, least) in product(CALLED.items(), recalled.items()):
        ours = f"distractors == 'growing' and encoding == '{PARTIAL}' and mode == '{mode}'"
        at = results.tables["right"].query(f"{ours} and distance == {multiple * results.length}")
        claim = f"recall, {name} at {multiple} L at least {least} % in the worst"
        worst = min(100 * at["right"] / at["asked"], default=math.nan)
        met = f"{'met' if worst >= least else 'MISSED'}: {claim} of {len(at)} seeds: {worst:.1f} %"
        found.append(f"not measured: {claim} seed" if at.empty else met)
    return found


def two_looks_verdicts(results: Results) -> list[str]:
    """How many seeds of each recipe learn the task, and the worst of those that do, of the recommended one."""
    (least,) = RECALLED_IN_TWO_LOOKS.values()
    right = results.tables["right"]
    at_length = right.query(f"distractors == 'growing' and mode == 'dense' and distance == {results.length}")
    learned = at_length[100 * at_length["right"] >= least * at_length["asked"]]
    counts = (
        f"{encoding} {sum(learned['encoding'] == encoding)} of {len(group)}"
        for encoding, group in at_length.groupby("encoding", sort=False)
    )
    seeds = learned.query(f"encoding == '{PARTIAL}'")["seed"]
    of_those = replace(results, tables={"right": right[right["seed"].isin(seeds)]})
    told = f"reported: seeds that recall at least {least} % at L: {', '.join(counts)}"
    return [told, *recall_verdicts(of_those, RECALLED_IN_TWO_LOOKS)]
