"""Runs are found and compared, cells measured once, and intervals are those of known samples."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from tiny import LAST, InterruptionError, changed_run

from train.errors import UserError
from train.measure import (
    REPLICATES,
    Results,
    against,
    by_window,
    estimate,
    in_lengths,
    measure,
    octaves,
    read_cells,
    results_of,
    table,
)
from train.modes import Mode
from train.runs import Run, check_comparable, find_runs, read_run

MODES = [Mode("dense", "dense"), Mode("BCA", "BCA, blocks of 8", block_size=8)]
SETTINGS = {"context_length": 16, "documents": ["a", "b"]}


def test_runs_are_found_once_whichever_folders_are_given(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs / "xpos")
    found = find_runs([runs / "xpos", tmp_path / "link", runs / "rotary" / ".." / "xpos" / "seed1", runs])
    assert [(run.encoding, run.seed) for run in found] == [("xPos", 1), ("xPos", 2), ("RoPE", 1)]
    check_comparable(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["datamodule_hyper_parameters"].update(val_fraction=0.2), "(data.val_fraction: "),
        (lambda c: c.update(global_step=1), "(steps: 8 there, 1 here)"),
        (lambda c: c["hyper_parameters"].update(embed_dim=32), "(model.embed_dim: 16 there, 32 here)"),
        (lambda c: c["hyper_parameters"]["positions"]["init_args"].update(scale_base=3), ".scale_base: 8.0 there, 3 "),
        (lambda c: c["TextData"].update(tokenizer="{}"), "(tokenizer: "),
        (lambda c: None, "are both seed 1 of xPos"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(change, message, runs, tmp_path):
    copy = changed_run(runs / "xpos" / "seed1", tmp_path / "copy", change)
    with pytest.raises(UserError, match=r"^runs: ") as refused:
        check_comparable(find_runs([runs / "xpos", copy]))
    assert message in str(refused.value)
    if "scale_base" in message:  # which encodings may differ in
        check_comparable(find_runs([copy, runs / "rotary"]))


def test_what_is_no_run_of_text_is_refused(runs, tmp_path):
    def odd(content: dict[str, Any]) -> None:
        content["datamodule_hyper_parameters"]["context_length"] = 18
        content["TextData"]["tokenizer"] = "{}"

    copy = changed_run(runs / "xpos" / "seed1", tmp_path / "odd", odd)
    for folder, option, message in (
        (tmp_path / "nowhere", "paths", "no trained run in '.*nowhere'"),
        (runs, "couples", "no data.couples: it was trained for something else"),
        (copy, "paths", "the context length must be a multiple of 4, got 18"),
    ):
        with pytest.raises(UserError, match=message):
            find_runs([folder], option)
    with pytest.raises(UserError, match=r"another tokenizer than data\.tokenizer gives now"):
        read_run(copy / LAST).text()


class Counted:
    """A measurement that tells its calls, and is interrupted after `last` of them."""

    def __init__(self, last: int = 99):
        self.calls: list[tuple[str, int, str]] = []
        self.last = last

    def __call__(self, run: Run, mode: Mode) -> dict[str, pd.DataFrame]:
        if len(self.calls) == self.last:
            raise InterruptionError
        self.calls.append((run.encoding, run.seed, mode.name))
        return {"loss": pd.DataFrame({"window": [0, 1], "loss": [run.seed + 1 / 3, 2.0]})}


def test_a_measurement_that_is_interrupted_goes_on_and_ends_the_same(runs, tmp_path):
    found, path = find_runs([runs]), tmp_path / "results.json"
    whole = measure(found, MODES, SETTINGS, tmp_path / "whole.json", Counted())
    with pytest.raises(InterruptionError):
        measure(found, MODES, SETTINGS, path, Counted(last=4))
    rest, none = Counted(), Counted()
    results = measure(found, MODES, SETTINGS, path, rest)
    assert len(rest.calls) == 2 * 3 - 4
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
    for same in (whole, measure(found, MODES, SETTINGS, path, none), results_of(*read_cells(path))):
        pd.testing.assert_frame_equal(same.tables["loss"], results.tables["loss"])
    assert none.calls == []
    assert list(results.tables["loss"]["document"].unique()) == ["a", "b"]
    assert results.tables["loss"]["loss"].iloc[0] in (1.33333, 2.33333)  # five digits
    assert not list(tmp_path.glob("*.draft"))


def test_only_what_is_new_is_measured_and_all_is_kept(runs, tmp_path):
    path, work = tmp_path / "results.json", Counted()
    measure(find_runs([runs / "xpos" / "seed1"]), MODES, SETTINGS, path, work)
    both = measure(find_runs([runs / "xpos"]), MODES[:1], SETTINGS, path, work)
    assert work.calls == [("xPos", 1, "dense"), ("xPos", 1, "BCA"), ("xPos", 2, "dense")]
    assert len(read_cells(path)[1]) == 3
    assert set(both.tables["loss"]["mode"]) == {"dense"}  # what was asked for

    def other(content: dict[str, Any]) -> None:
        content["state_dict"]["transformer.embedding.weight"] *= 2

    again = changed_run(runs / "xpos" / "seed1", tmp_path / "again", other)
    measure(find_runs([again]), MODES, SETTINGS, path, work)
    assert work.calls[3:] == [("xPos", 1, "dense"), ("xPos", 1, "BCA")]
    assert len(read_cells(path)[1]) == 3


def test_a_file_with_other_settings_or_damaged_is_left_alone(runs, tmp_path):
    found, path = find_runs([runs]), tmp_path / "results.json"
    measure(found, MODES, SETTINGS, path, Counted())
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"^output: \S+ has context_length 16, not 32; remove it, or give another$"):
        measure(found, MODES, SETTINGS | {"context_length": 32}, path, Counted())
    assert path.read_bytes() == before
    path.write_bytes(before[:100])
    with pytest.raises(UserError, match="holds no results, or damaged ones"):
        measure(found, MODES, SETTINGS, path, Counted())


def test_two_processes_do_not_write_one_file_of_results(runs, tmp_path):
    path = tmp_path / "results.json"
    with (
        FileLock(tmp_path / ".results.lock"),
        pytest.raises(UserError, match=rf"^output: another process is measuring into {path}; wait for it"),
    ):
        measure(find_runs([runs]), MODES, SETTINGS, path, Counted())
    assert not path.exists()


def test_notes_stay_with_what_was_measured(runs, tmp_path):
    path = tmp_path / "results.json"
    for mode, notes in zip(MODES, (["a doubt"], []), strict=True):
        settings = SETTINGS | ({"notes": notes} if notes else {})
        assert measure(find_runs([runs]), [mode], settings, path, Counted()).settings["notes"] == ["a doubt"]
    assert read_cells(path)[0] == SETTINGS | {"notes": ["a doubt"]}


def windows(values: Any, documents: list[str]) -> pd.DataFrame:
    columns = pd.MultiIndex.from_arrays([documents, range(len(documents))], names=["document", "window"])
    return pd.DataFrame(np.asarray(values), columns=columns)


def by_resampling(values: np.ndarray, documents: list[str]) -> tuple[float, float]:
    """The interval as the protocol says it, replicate by replicate, from the same random numbers."""
    names = sorted(set(documents))
    rng = np.random.default_rng(0)
    runs = rng.integers(len(values), size=(REPLICATES, len(values), 1))
    chosen = rng.integers(len(names), size=(REPLICATES, 1, len(names)))
    means = []
    for r, d in zip(runs[..., 0], chosen[:, 0], strict=True):
        taken = [j for each in d for j, name in enumerate(documents) if name == names[each]]
        means.append(values[np.ix_(r, taken)].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return low, high


def test_the_interval_resamples_seeds_then_whole_documents():
    values, documents = np.random.default_rng(4).normal(size=(3, 7)), list("abbcacd")
    assert estimate(windows(values, documents))[1:] == pytest.approx(by_resampling(values, documents), rel=1e-12)


def losses(encodings: tuple[str, ...] = ("xPos", "RoPE"), modes: int = 2) -> Results:
    """Two seeds whose levels differ, and rise by 0.5 nats beyond L."""
    cells = [
        {"encoding": e, "mode": m, "label": f"{m} 8", "seed": s, "tables": {"loss": {
            "context": [8, 8, 16, 16, 64, 64], "window": [0, 1] * 3, "loss": [s, s, s, s + 1, s + 0.5, s + 1.5],
        }}}
        for e in encodings for m in ("dense", "BCA", "tail", "sliding")[:modes] for s in (1, 2)
    ]  # fmt: skip
    return results_of(SETTINGS, cells)


def test_differences_are_paired_by_seed_and_window():
    rises = against(losses().tables["loss"], "context", 16)
    at = by_window(rises.query("encoding == 'xPos' and mode == 'BCA' and context == 64"))
    assert at.to_numpy().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert estimate(at) == (0.5, 0.5, 0.5)


def test_a_table_has_a_row_a_mode_and_encoding_and_a_column_a_length():
    lines = table(losses().tables["loss"], "context", lambda group: f"{group['loss'].mean():.2f}", 16).splitlines()
    rows = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["context", "L/2", "L", "4 L"]
    assert [row[0] for row in rows[2:]] == ["xPos, dense 8", "RoPE, dense 8", "xPos, BCA 8", "RoPE, BCA 8"]
    assert rows[2][1:] == ["1.50", "2.00", "2.50"]
    assert [in_lengths(size, 12) for size in octaves(12, 4)] == ["L/4", "L/2", "L", "2 L", "4 L"]
