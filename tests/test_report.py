"""Averages, intervals, verdicts and bins of a report, on measurements made up to have known ones."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from train.measured import REPLICATES, Measured, interval
from train.report import logarithmic_bins, plot_contexts, rise_over_trained, write_report
from train.thresholds import Evidence, verdicts

L = 16
CONTEXTS = [L * 2**k // 4 for k in range(9)]  # up to 64 L
DOCUMENTS = [f"d{i}" for i in range(4)]
MODES = {
    "dense": "dense",
    "temperature": "dense, temperature 0.2",
    "tail": "dense, soft tail 2",
    "BCA": "BCA, blocks of 8",
    "recompute": "recompute the last 16",
}

# Of the protocol's thresholds, by how they begin.
CLAIMS = [
    "collapse",
    "xPos dense",
    "flat",
    "open context, with temperature",
    "open context, with a soft tail",
    "fair win",
    "no worse",
]

Rise = Callable[[float], float]  # of the context in trained lengths


def cell(encoding: str, mode: str, rise: Rise, seed: int = 1, level: float = 2.0, longest: int = 64) -> dict[str, Any]:
    """A measurement in which every window's loss is `level` at the trained length and rises as said."""
    contexts = [context for context in CONTEXTS if context <= longest * L]
    return {
        "encoding": encoding,
        "mode": mode,
        "label": MODES[mode],
        "seed": seed,
        "losses": {str(c): [level + rise(c / L) + w / 10 for w in range(len(DOCUMENTS))] for c in contexts},
        "by_position": [level + 1 / position for position in range(1, contexts[-1] + 1)],
    }


def told(cells: list[dict[str, Any]]) -> dict[str, str]:
    """The verdicts, by how their claims begin."""
    keys = dict.fromkeys((c["encoding"], c["mode"]) for c in cells)
    lines = {key: Measured([c for c in cells if (c["encoding"], c["mode"]) == key]) for key in keys}
    found = verdicts(Evidence(lines, DOCUMENTS, L))
    assert len(found) == len(CLAIMS)
    assert all(verdict.split(": ", 1)[1].startswith(claim) for verdict, claim in zip(found, CLAIMS, strict=True))
    return dict(zip(CLAIMS, found, strict=True))


def flat(_: float) -> float:
    return 0.0


def at(**rises: float) -> Rise:
    """A rise at some contexts: at(x4=1.0) is 1 nat at 4 L and nothing elsewhere."""
    return lambda lengths: rises.get(f"x{lengths:g}", 0.0)


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "cells", "met", "figure"),
    [
        ("collapse", [("RoPE", "dense", at(x4=1.01))], True, "+1.010"),
        ("collapse", [("RoPE", "dense", at(x4=0.99, x8=5))], False, "+0.990"),
        ("collapse", [("RoPE", "dense", at(x4=-2))], False, "-2.000"),
        ("xPos dense", [("xPos", "dense", at(x2=0.049, x4=9))], True, "+0.049"),
        ("xPos dense", [("xPos", "dense", at(x2=0.051))], False, "+0.051"),
        ("xPos dense", [("xPos", "dense", at(x2=-0.2))], True, "-0.200"),
        ("flat", [("xPos", "BCA", at(x64=0.019))], True, "at most +0.0190 [+0.0190, +0.0190], at 64 L"),
        ("flat", [("xPos", "BCA", at(x2=0.021))], False, "at most +0.0210 [+0.0210, +0.0210], at 2 L"),
        ("flat", [("xPos", "BCA", lambda x: -0.01 if x > 1 else 0)], True, "at most -0.0100 [-0.0100, -0.0100], at "),
        ("flat", [("xPos", "BCA", at(**{"x0.25": 1.0, "x0.5": 1.0}))], True, "at most +0.0000"),
        *(
            (claim, [("xPos", mode, xpos), ("RoPE", mode, rope)], met, figure)
            for claim, mode in (
                ("open context, with temperature", "temperature"),
                ("open context, with a soft tail", "tail"),
            )
            for xpos, rope, met, figure in (
                (at(x32=0.09, x64=3), at(x32=1.1), True, "xPos at most +0.090 [+0.090, +0.090], RoPE +1.100"),
                (at(x8=0.11), at(x32=1.1), False, "xPos at most +0.110 [+0.110, +0.110], RoPE +1.100"),
                (flat, at(x16=5, x32=0.9), False, "xPos at most +0.000 [+0.000, +0.000], RoPE +0.900"),
            )
        ),
        ("no worse", [("xPos", "BCA", at(x8=0.009)), ("xPos", "recompute", flat)], True, "at most +0.0090"),
        ("no worse", [("xPos", "BCA", at(x8=0.011)), ("xPos", "recompute", flat)], False, "+0.0110], at 8 L"),
        ("no worse", [("xPos", "BCA", at(x8=0.3)), ("xPos", "recompute", at(x8=0.3, x4=1))], True, "at most +0.0000"),
    ],
)
def test_a_threshold_is_met_on_its_one_side_and_missed_on_the_other(
    claim: str, cells: list[tuple[str, str, Rise]], met: bool, figure: str
) -> None:
    verdict = told([cell(*each) for each in cells])[claim]
    assert verdict.startswith("met: " if met else "MISSED: ")
    assert figure in verdict


def test_flat_is_judged_by_the_upper_end_of_the_interval() -> None:
    unsteady = cell("xPos", "BCA", flat)
    unsteady["losses"][str(4 * L)] = [
        loss + d for loss, d in zip(unsteady["losses"][str(L)], (0, 0, 0, 0.06), strict=True)
    ]
    rise = np.array(unsteady["losses"][str(4 * L)]) - np.array(unsteady["losses"][str(L)])
    assert rise.mean() < 0.02
    assert told([unsteady])["flat"].startswith("MISSED")


@pytest.mark.parametrize(("xpos", "rope", "sign"), [(0.03, 0.01, "+0.0200"), (0.01, 0.05, "-0.0400")])
def test_the_fair_comparison_is_reported_whichever_way_it_falls(xpos: float, rope: float, sign: str) -> None:
    cells = [
        cell(encoding, "BCA", at(x4=rise), seed, level=seed)
        for encoding, rise in (("xPos", xpos), ("RoPE", rope))
        for seed in (1, 2)
    ]
    for order in (cells, cells[::-1]):
        verdict = told(order)["fair win"]
        assert verdict.startswith("reported, whichever way it falls: ")
        assert f"xPos BCA rises more than RoPE BCA by: {sign} [{sign}, {sign}] nats" in verdict
    verdict = told(cells[:3])["fair win"]
    assert verdict.startswith("not measured: ")
    assert verdict.endswith(": the two have other seeds")


@pytest.mark.parametrize("cells", [[("RoPE", "BCA", flat)], [("ALiBi", "dense", flat)]])
def test_what_is_not_in_the_matrix_is_said_to_be_not_measured(cells: list[tuple[str, str, Rise]]) -> None:
    found = told([cell(*each) for each in cells])
    assert {verdict.split(": ")[0] for verdict in found.values()} == {"not measured"}
    for claim, lacking in (
        ("collapse", "RoPE dense"),
        ("xPos dense", "xPos dense"),
        ("flat", "xPos BCA"),
        ("open context, with temperature", "xPos temperature"),
        ("open context, with a soft tail", "xPos tail"),
        ("fair win", "xPos BCA"),
        ("no worse", "xPos BCA"),
    ):
        assert found[claim].endswith(f": {lacking} is not in this matrix"), claim


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (1, "-------"),
        (2, "-+-----"),
        (4, "++---r-"),
        (32, "++-++r-"),
        (64, "+++++r+"),
    ],
)
def test_a_threshold_is_not_judged_before_its_context_is_reached(longest: int, expected: str) -> None:
    cells = [
        cell(
            encoding,
            mode,
            flat if encoding == "xPos" or mode == "BCA" else lambda x: max(0, x / 2 - 0.6),
            1,
            2.0,
            longest,
        )
        for encoding, mode in itertools.product(("xPos", "RoPE"), MODES)
    ]
    found = told(cells)
    told_as = {"-": "not measured", "+": "met", "r": "reported, whichever way it falls"}
    assert [verdict.split(": ")[0] for verdict in found.values()] == [told_as[each] for each in expected]
    if longest < 32:
        assert f": contexts end at {longest} L".replace("1 L", "L") in found["open context, with temperature"]


@pytest.mark.parametrize(("claim", "mode"), [("flat", "BCA"), ("open context, with temperature", "temperature")])
def test_a_threshold_that_is_crossed_early_is_missed_however_far_contexts_go(claim: str, mode: str) -> None:
    cells = [cell(encoding, mode, at(x2=0.2), longest=2) for encoding in ("xPos", "RoPE")]
    assert told(cells)[claim].startswith("MISSED: ")


# --- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_constant_is_that_constant() -> None:
    assert interval(np.full((3, 5), 0.25), ["a", "b", "b", "c", "d"]) == (0.25, 0.25)


def test_the_interval_over_many_documents_is_that_of_a_normal_mean() -> None:
    count = 400
    sample = np.random.default_rng(1).normal(3.0, 2.0, size=(1, count))
    low, high = interval(sample, [f"d{i}" for i in range(count)])
    error = float(sample.std()) / math.sqrt(count)
    # A 2.5 % quantile of R replicates of a normal variable has the standard error sqrt(0.025 * 0.975 / R) / density.
    quantile_error = math.sqrt(0.025 * 0.975 / REPLICATES) / 0.0584 * error
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=5 * quantile_error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=5 * quantile_error)


def test_more_windows_of_the_same_documents_do_not_narrow_the_interval() -> None:
    once = np.random.default_rng(2).normal(size=(2, 10))
    names = [f"d{i}" for i in range(10)]
    narrow = interval(once, names)
    assert interval(np.tile(once, (1, 6)), names * 6) == pytest.approx(narrow, rel=1e-12)


def test_the_interval_spans_runs_that_disagree() -> None:
    low, high = interval(np.array([[-1.0] * 4, [1.0] * 4]), DOCUMENTS)
    assert (low, high) == (-1.0, 1.0)  # one in four samples draws the same of two runs twice


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_the_interval_lies_within_the_measurements(runs: int, windows: int, seed: int) -> None:
    sample = np.random.default_rng(seed).normal(size=(runs, windows))
    names = [f"d{i // 2}" for i in range(windows)]
    low, high = interval(sample, names)
    rounding = 1e-12
    assert sample.min() - rounding <= low <= high <= sample.max() + rounding


# --- averages --------------------------------------------------------------------------------------------------------


def test_a_line_is_the_mean_over_seeds_and_windows() -> None:
    cells = [cell("xPos", "dense", at(x4=0.3), seed, level) for seed, level in ((2, 5.0), (1, 1.0))]
    line = Measured(cells)
    assert line.seeds == [1, 2]
    assert line.losses[L][:, 0].tolist() == [1.0, 5.0]
    assert line.mean(4 * L) == pytest.approx(3.0 + 0.3 + 0.15)
    assert line.by_position[0] == pytest.approx(3.0 + 1)
    rise, low, high = rise_over_trained(line, DOCUMENTS, L)[4 * L]
    assert (rise, low, high) == pytest.approx((0.3, 0.3, 0.3))  # paired: levels of seeds and windows cancel


# --- bins ------------------------------------------------------------------------------------------------------------


def test_bins_are_octaves_of_positions() -> None:
    centres, means = logarithmic_bins(np.arange(1.0, 9.0), bins_per_octave=1)
    assert means == [1.0, 2.5, 6.0]  # of position 1, of 2 and 3, of 4 to 8
    assert centres == pytest.approx([1.0, math.sqrt(2 * 3), math.sqrt(4 * 8)])


@given(st.integers(2, 3000), st.integers(1, 4))
def test_every_position_is_in_one_bin(count: int, bins_per_octave: int) -> None:
    positions = np.arange(1.0, count + 1)
    _, of_ones = logarithmic_bins(np.ones(count), bins_per_octave)
    centres, means = logarithmic_bins(positions, bins_per_octave)
    assert of_ones == [1.0] * len(centres)
    first, expected = 1.0, []  # a bin that begins at f and whose mean is m ends at 2 m - f
    for mean in means:
        expected.append((first, 2 * mean - first))
        first = 2 * mean - first + 1
    assert expected[0][0] == 1
    assert expected[-1][1] == count
    assert all(begin <= centre <= end for (begin, end), centre in zip(expected, centres, strict=True))


# --- the report ------------------------------------------------------------------------------------------------------


def all_cells() -> list[dict[str, Any]]:
    return [
        cell(encoding, mode, at(x2=0.5, x64=1.5), seed)
        for mode, encoding, seed in itertools.product(MODES, ("xPos", "RoPE"), (1, 2, 3))
    ]


def table_of(report: str, title: str) -> dict[str, list[str]]:
    """A table's rows by their heads."""
    lines = itertools.takewhile(bool, report.split(f"## {title}\n\n")[1].splitlines())
    rows = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_the_report_holds_each_number_in_each_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(all_cells(), DOCUMENTS, CONTEXTS, 1000, tmp_path)
    report = (tmp_path / "report.md").read_text()
    loss = 2.0 + 0.15 + 1.5  # at 64 L, over windows
    for title, expected in (
        ("Loss, nats a byte", f"{loss:.3f}"),
        ("Perplexity a byte", f"{math.exp(loss):.2f}"),
        ("Bits a byte", f"{loss / math.log(2):.3f}"),
        ("Difference against context L, nats a byte, with 95 % interval", "+1.500 [+1.500, +1.500]"),
    ):
        table = table_of(report, title)
        assert table["context"] == ["L/4", "L/2", "L", "2 L", "4 L", "8 L", "16 L", "32 L", "64 L"]
        assert len(table) == 2 + 10
        assert table["xPos, dense"][-1] == expected
    assert "seeds 1, 2, 3; trained at L = 16 for 1000 steps" in report
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["cells"]) == 10 * len(CONTEXTS)
    longest = [entry["loss"] for entry in summary["cells"] if entry["context"] == 64 * L]
    assert longest == pytest.approx([loss] * 10)


def test_lines_that_coincide_are_both_seen_in_the_plot(tmp_path: Path) -> None:
    colours = []
    for encodings in (("xPos",), ("RoPE",), ("xPos", "RoPE"), ("RoPE", "xPos")):
        lines = [Measured([cell(encoding, "BCA", flat)]) for encoding in encodings]
        plot_contexts(lines, CONTEXTS, DOCUMENTS, tmp_path / "plot.png", "byte")
        picture = imread(tmp_path / "plot.png")[:, :800, :3]  # without the legend
        red, _, blue = picture.transpose(2, 0, 1)
        colours.append((int((blue > red + 0.2).sum()), int((red > blue + 0.2).sum())))
    (xpos, _), (_, rope), *both = colours
    for blue, red in both:
        assert blue > 0.8 * xpos
        assert red > 0.3 * rope


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_is_said_to_be_one_seed(seeds: int, tmp_path: Path) -> None:
    write_report([c for c in all_cells() if c["seed"] <= seeds], DOCUMENTS, CONTEXTS, 1000, tmp_path)
    warned = "With one seed they say nothing about another training." in (tmp_path / "report.md").read_text()
    assert warned == (seeds == 1)
