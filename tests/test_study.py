"""The study: thresholds, documents that agree with the results, and what is trained and measured."""

import itertools
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import changed_run, complaint_of

import study.__main__ as study_main
import study.tables
from study.recipes import HEADLINE, P_ROPE, PARTIAL, with_qk_norm
from study.tables import DOCUMENT, MARKED, PLOTS, RESULTS, TABLES, filled
from study.thresholds import LONG_THRESHOLDS, recall_verdicts, two_looks_verdicts, verdicts
from train.errors import command
from train.measure import Results, read_cells, results_of, write_cells

L = 16
MODES = ("dense", "log-n", "tail", "BCA", "recompute")
CLAIMS = ("collapse", "xPos dense", "flat", "open context, with log", "open context, with a", "fair win", "no worse")
Rise = Callable[[float], float]  # of the context in trained lengths


def cell(encoding: str, mode: str, rise: Rise, seed: int = 1, longest: int = 64) -> dict[str, Any]:
    """A measurement in which every window's loss is its own level at the trained length and rises as said."""
    rows = [
        (c, w, seed + w / 10 + rise(c / L))
        for c in (L * 2**k // 4 for k in range(9))
        for w in range(4)
        if c <= longest * L
    ]
    loss = dict(zip(("context", "window", "loss"), map(list, zip(*rows, strict=True)), strict=True))
    return {"encoding": encoding, "mode": mode, "label": mode, "seed": seed, "tables": {"loss": loss}}


def results(cells: list[dict[str, Any]]) -> Results:
    return results_of({"context_length": L, "documents": list("abcd")}, cells)


def told(cells: list[dict[str, Any]]) -> dict[str, str]:
    """The verdicts, by how their claims begin."""
    found = verdicts(results(cells))
    assert all(verdict.split(": ", 1)[1].startswith(claim) for verdict, claim in zip(found, CLAIMS, strict=True))
    return dict(zip(CLAIMS, found, strict=True))


def flat(_: float) -> float:
    return 0.0


def at(**rises: float) -> Rise:
    """A rise at some contexts: at(x4=1.0) is 1 nat at 4 L and nothing elsewhere."""
    return lambda lengths: rises.get(f"x{lengths:g}", 0.0)


@pytest.mark.parametrize(
    ("claim", "cells", "met", "figure"),
    [
        ("collapse", [("RoPE", "dense", at(x4=1.01))], True, "+1.010"),
        ("collapse", [("RoPE", "dense", at(x4=0.99, x8=5))], False, "+0.990"),
        ("xPos dense", [("xPos", "dense", at(x2=0.049, x4=9))], True, "+0.049"),
        ("xPos dense", [("xPos", "dense", at(x2=0.051))], False, "+0.051"),
        ("flat", [("xPos", "BCA", at(x64=0.019))], True, "at most +0.0190 [+0.0190, +0.0190], at 64 L"),
        ("flat", [("xPos", "BCA", at(x2=0.021))], False, "at most +0.0210 [+0.0210, +0.0210], at 2 L"),
        *(
            (claim, [("xPos", mode, xpos), ("RoPE", mode, rope)], met, figure)
            for claim, mode in ((CLAIMS[3], "log-n"), (CLAIMS[4], "tail"))
            for xpos, rope, met, figure in (
                (at(x32=0.09, x64=3), at(x32=1.1), True, "xPos at most +0.090 [+0.090, +0.090], RoPE +1.100"),
                (at(x8=0.11), at(x32=1.1), False, "xPos at most +0.110 [+0.110, +0.110], RoPE +1.100"),
                (flat, at(x16=5, x32=0.9), False, "xPos at most +0.000 [+0.000, +0.000], RoPE +0.900"),
            )
        ),
        ("no worse", [("xPos", "BCA", at(x8=0.009)), ("xPos", "recompute", flat)], True, "at most +0.0090"),
        ("no worse", [("xPos", "BCA", at(x8=0.011)), ("xPos", "recompute", flat)], False, "+0.0110], at 8 L"),
    ],
)
def test_a_threshold_is_met_on_its_one_side_and_missed_on_the_other(claim, cells, met, figure):
    verdict = told([cell(*each) for each in cells])[claim]
    assert verdict.startswith("met: " if met else "MISSED: ")
    assert figure in verdict


@pytest.mark.parametrize(
    ("ours", "met"),
    [
        ((-0.2, at(x2=-0.01, x8=-0.01)), "+++"),
        ((-0.2, at(x16=0.009, x64=0.019)), "++-"),  # text beyond L must help, not merely do no harm
        ((-0.2, at(x2=-0.01, x8=-0.01, x16=0.011)), "-++"),
        ((-0.2, at(x2=-0.01, x8=-0.01, x64=0.021)), "-++"),
        ((-0.2, at(x2=-0.01, x8=0.001)), "++-"),
        ((-0.05, at(x2=-0.01, x8=-0.01)), "+-+"),  # below RoPE, not below xPos
    ],
)
def test_a_kept_context_is_judged_by_rise_level_and_gain_as_trained_and_with_a_discount(ours, met):
    level, rise = ours
    cells = [cell("RoPE", "dense", flat), cell("xPos", "dense", lambda _: -0.1)]
    cells += [cell(P_ROPE, "dense", at(x64=1)), cell(PARTIAL, "dense", lambda x: level + rise(x))]
    cells += [cell(PARTIAL, "discount", lambda _: level)]
    found = verdicts(results(cells), LONG_THRESHOLDS)
    judged = ["-" if verdict.startswith("MISSED") else "+" for verdict in found]
    assert [judged[0], judged[2], judged[3]] == list(met)
    assert [judged[1], judged[4]] == ["+", "-"]  # flat: no rise, no gain
    assert found[5].endswith(f"{level + rise(64) - 1:+.4f}, {level + rise(64) - 1:+.4f}] nats at 64 L")


def test_the_fair_comparison_is_reported_whichever_way_it_falls():
    for xpos, rope, sign in ((0.03, 0.01, "+0.0200"), (0.01, 0.05, "-0.0400")):
        pairs = itertools.product((("xPos", xpos), ("RoPE", rope)), (1, 2))
        cells = [cell(encoding, "BCA", at(x4=rise), seed) for (encoding, rise), seed in pairs]
        verdict = told(cells[::-1])["fair win"]
        assert verdict.startswith("reported, whichever way it falls: ")
        assert verdict.endswith(f"{sign} [{sign}, {sign}] nats")
        assert told(cells[:3])["fair win"].endswith(": the two have other seeds")


@pytest.mark.parametrize(("longest", "expected"), [(1, "-------"), (2, "-+-----"), (4, "++---r-"), (64, "+++++r+")])
def test_a_threshold_is_not_judged_before_its_context_is_reached(longest, expected):
    def rise(encoding: str, mode: str) -> Rise:
        return flat if encoding == "xPos" or mode == "BCA" else lambda x: max(0, x / 2 - 0.6)

    pairs = itertools.product(("xPos", "RoPE"), MODES)
    found = told([cell(*pair, rise(*pair), longest=longest) for pair in pairs])
    told_as = {"-": "not measured", "+": "met", "r": "reported, whichever way it falls"}
    assert [verdict.split(": ")[0] for verdict in found.values()] == [told_as[each] for each in expected]
    assert all(verdict.startswith("not measured") for verdict in told([cell("ALiBi", "dense", flat)]).values())
    early, unsteady = cell("xPos", "BCA", at(x2=0.2), longest=2), cell("xPos", "BCA", flat)
    assert told([early])["flat"].startswith("MISSED: ")
    unsteady["tables"]["loss"]["loss"][-1] += 0.06  # of one window in four: 0.015 in the mean, the upper end is higher
    assert told([unsteady])["flat"].startswith("MISSED: ")


def recalled(encoding: str, seed: int, *right: int, mode: str = "dense") -> dict[str, Any]:
    """Of 100 questions at L, 4 L, 8 L, 32 L and 64 L, among distractors that grow; all right among fixed ones."""
    at, count = [multiple * L for multiple in (1, 4, 8, 32, 64)], len(right)
    table = {"distractors": ["growing"] * count + ["fixed"] * count, "distance": 2 * at[:count]}
    table |= {"right": [*right, *[100] * count], "asked": [100] * 2 * count}
    return {"encoding": encoding, "mode": mode, "label": mode, "seed": seed, "tables": {"right": table}}


def test_recall_is_judged_by_the_worst_seed_and_in_two_looks_by_the_worst_that_learned_it():
    found = recall_verdicts(results([recalled(PARTIAL, 1, 100, 100, 99, 96, 94), recalled(PARTIAL, 2, *[100] * 5)]))
    assert [verdict.split(": ")[0] for verdict in found] == ["met", "met", "MISSED", *["not measured"] * 3]
    assert found[2].endswith("at 64 L at least 95 % in the worst of 2 seeds: 94.0 %")
    cells = [recalled("xPos", 1, 100, 0), recalled(PARTIAL, 1, 100, 95), recalled(PARTIAL, 2, 89, 10)]
    cells += [recalled(PARTIAL, 1, 100, 89, mode="discount"), recalled(PARTIAL, 2, 89, 10, mode="discount")]
    told, verdict, discounted = two_looks_verdicts(results(cells))
    assert told.endswith(f"at least 90 % at L: xPos 1 of 1, {PARTIAL} 1 of 2")
    assert discounted == f"MISSED: recall, {PARTIAL}, discount 2 at 4 L at least 90 % in the worst of 1 seeds: 89.0 %"
    assert verdict == f"met: recall, {PARTIAL} at 4 L at least 90 % in the worst of 1 seeds: 95.0 %"
    assert two_looks_verdicts(results([*cells, recalled(PARTIAL, 3, 90, 89)]))[1].startswith("MISSED: ")
    assert two_looks_verdicts(results([cells[0], cells[2]]))[1].startswith("not measured: ")


def test_the_document_holds_every_table_and_plot_as_the_results_have_it():
    text = DOCUMENT.read_text()
    marked = [match[1] for match in MARKED.finditer(text)]
    assert sorted(marked) == sorted(TABLES)
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(marked)
    assert filled(text) == text, "docs/extrapolation.md is not what `python -m study.tables` makes of the results"
    assert all(f"]({plot}.png)" in text for plot in PLOTS)
    for path in RESULTS.glob("*.json"):
        assert all(cell["commit"] for cell in read_cells(path)[1])


NORMED = with_qk_norm(128, 4)


@pytest.mark.parametrize("name", ["recipes_loss", "recipes_recall", "recipes_use", "recall_cosine"])
def test_means_that_stand_side_by_side_are_of_the_same_seeds(name):
    seeds: dict[tuple[str, str], set[int]] = {}
    for each in read_cells(RESULTS / f"{name}.json")[1]:
        seeds.setdefault((each["encoding"], each["label"]), set()).add(each["seed"])
    for (encoding, _), found in seeds.items():
        unfinished = set(range(1, len(found) + 1)) if encoding in NORMED else {1}
        assert found == ({1, 2, 3, 4, 5} if encoding in HEADLINE else unfinished), encoding


@pytest.mark.slow
@pytest.mark.parametrize("plot", PLOTS)
def test_every_panel_of_every_plot_shows_something(plot):
    names, make = PLOTS[plot]
    grid = make(*(results_of(*read_cells(RESULTS / f"{name}.json")) for name in names))
    assert all(axes.has_data() for axes in grid.axes.flat)


def test_the_trainer_never_imports_the_study():
    for path in (study.tables.ROOT / "train").glob("*.py"):
        assert not re.search(r"^\s*(from|import) study\b", path.read_text(), re.MULTILINE), path


def test_a_table_is_made_anew_between_its_marks_and_nothing_else_changes(tmp_path):
    content = {"settings": {"context_length": L, "documents": list("abcd")}, "cells": [cell("xPos", "dense", at(x4=1))]}
    (tmp_path / "loss.json").write_text(json.dumps(content))
    text = "a\n<!-- table: matrix -->\nold\n<!-- end -->\nb\n<!-- table: recall -->\nold\n<!-- end -->\n"
    made = filled(text, tmp_path)
    assert made.startswith("a\n<!-- table: matrix -->\n| context")
    assert "| xPos, dense | 1.150 | 1.150 | 1.150 | 1.150 | 2.150 |" in made
    assert made.endswith("|\n<!-- end -->\nb\n<!-- table: recall -->\nnot measured yet\n<!-- end -->\n")
    assert filled(made, tmp_path) == made


@pytest.fixture
def small(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study whose trainings copy a run, and whose documents are left alone; keeps the commands of trainings."""
    state: dict[str, Any] = {"trained": [], "stop_at": None}

    def train(args: list[str]) -> None:
        if len(state["trained"]) == state["stop_at"]:
            raise KeyboardInterrupt
        option = dict(itertools.pairwise(args))
        name, seed = option["--name"], int(option["--seed_everything"])

        def change(content: dict[str, Any]) -> None:
            content["datamodule_hyper_parameters"]["seed"] = seed

        run = Path(option["--runs"]) / name / f"seed{seed}"
        if not run.exists():  # else it is finished
            changed_run(runs / ("rotary" if name == "rope" else "xpos") / "seed1", run, change)
            state["trained"].append((name, seed))

    for name in ("cpu", "recall"):
        sizes: dict[str, dict[str, int]] = {"data": {"context_length": L, "batch_size": 4}, "trainer": {"max_steps": 4}}
        sizes["model"] = {"num_heads": 2, "num_layers": 1}
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.dump(sizes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_main, "train", train)
    monkeypatch.setattr(study_main, "measure_loss", partial(study_main.measure_loss, windows=2))
    return state


def test_a_study_that_is_stopped_goes_on_and_what_has_results_is_not_trained_again(small, tmp_path, monkeypatch):
    parts = study_main.Study(seeds=(1, 2)).measurements()
    assert {part.name for part in parts} == {name for name, _ in TABLES.values()}
    (loss,) = [part for part in parts if part.name == "loss"]
    short = loss._replace(work=partial(study_main.measure_loss, longest=2), modes=loss.modes[:2])
    path = tmp_path / "loss.json"
    small["stop_at"] = 3
    with pytest.raises(KeyboardInterrupt):
        study_main.complete(short, path)
    small["stop_at"] = None
    study_main.complete(short, path)
    assert small["trained"] == [("xpos", 1), ("rope", 1), ("xpos", 2), ("rope", 2)]
    (tmp_path / "runs").rename(tmp_path / "gone")
    study_main.complete(short, path)
    assert len(small["trained"]) == 4
    settings, cells = read_cells(path)
    write_cells(path, settings, [each for each in cells if each["seed"] == 1])
    study_main.complete(short, path)
    assert small["trained"][4:] == [("xpos", 2), ("rope", 2)]
    assert len(read_cells(path)[1]) == 8


def test_a_wrong_argument_is_told_in_one_line(small, capfd):
    for args, message in (
        (["--seeds", "[1, 1]"], "seeds must be different ones, one at least, got (1, 1)"),
        (["--only", "[los]"], "only must name measurements, got los"),
        (["--size", "huge"], "huge"),
    ):
        assert message in complaint_of(partial(command, study_main.study), args, capfd)
