"""What a model makes of far context: made-up text and models whose answers are known, then tiny trained runs."""

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Encoding, scores, visible
from tiny import WRONG_ARGUMENTS, InterruptionError, calls_of_measure, complaint_of, fit, train_runs
from torch import Tensor

import train.context_use
from train.baselines import ALiBi, NoPositions, SlidingWindow
from train.context_use import (
    MODES,
    NGRAM,
    Settings,
    context_use,
    expected_scores,
    far_versions,
    main,
    occurrence_bins,
    occurrence_distances,
    others,
    resolution,
    sums_by_bin,
)
from train.errors import UserError
from train.extrapolate import choose_windows, token_losses
from train.runs import find_runs
from xpos_zoo import XPOS, RotaryEmbedding, Transformer

pytestmark = pytest.mark.usefixtures("few_replicates")

L = 16
SETTINGS = Settings(L, steps=2, longest=4, windows=4, text_sha256="", temperature=0.2, tail=4.0, data={})
NAMES = ["a", "b", "b", "c"]


def random_windows(count: int = 4, length: int = 4 * L + 1, tokens: int = 256) -> Tensor:
    return torch.randint(tokens, (count, length), generator=torch.Generator().manual_seed(1))


# --- far context -----------------------------------------------------------------------------------------------------


def test_versions_differ_in_far_text_alone() -> None:
    windows = random_windows()
    versions = far_versions(windows, NAMES, L)
    assert list(versions) == ["absent", "intact", "shuffled", "replaced"]
    assert torch.equal(versions["intact"], windows)
    for version in versions.values():
        assert torch.equal(version[:, -L - 1 :], windows[:, -L - 1 :])  # the last L inputs, and the last target
    assert versions["absent"].shape[1] == L + 1
    far = slice(0, 3 * L)
    shuffled, replaced = versions["shuffled"], versions["replaced"]
    assert torch.equal(shuffled[:, far].sort(1).values, windows[:, far].sort(1).values)
    assert (shuffled[:, far] != windows[:, far]).float().mean() > 0.9
    assert torch.equal(replaced[:, far], windows[[1, 3, 3, 0], far])
    again = far_versions(windows, NAMES, L)
    assert all(torch.equal(again[condition], version) for condition, version in versions.items())


def test_windows_are_shuffled_each_in_its_own_way() -> None:
    windows = torch.arange(4 * L + 1).repeat(3, 1)
    shuffled = far_versions(windows, ["a", "b", "c"], L)["shuffled"]
    assert not torch.equal(shuffled[0], shuffled[1])


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_text_is_replaced_by_that_of_another_document(names: list[str]) -> None:
    if len(set(names)) == 1:
        with pytest.raises(UserError, match=f"windows must come from two documents.*all are of {names[0]}"):
            others(names)
    else:
        assert all(names[other] != name for other, name in zip(others(names), names, strict=True))


@pytest.mark.parametrize("size", [L // 2, 2 * L])
def test_far_text_changes_nothing_for_a_model_whose_window_ends_before_it(size: int) -> None:
    torch.manual_seed(0)
    model = Transformer(256, 16, 1, 2).eval()  # one layer, so that nothing is handed on
    for parameter in model.parameters():
        parameter.data *= 5
    model.distance_bias = SlidingWindow(size)
    losses = {
        condition: token_losses(model, version)[:, -L // 2 :]
        for condition, version in far_versions(random_windows(), NAMES, L).items()
    }
    for condition in ("shuffled", "replaced"):
        same = torch.equal(losses[condition], losses["intact"])
        assert same == (size <= L // 2)
    if size <= L // 2:  # the first target's query has L/2 keys and its own
        torch.testing.assert_close(losses["absent"], losses["intact"], rtol=1e-5, atol=1e-5)


# --- last occurrence -------------------------------------------------------------------------------------------------


def by_brute_force(window: list[int]) -> list[int]:
    found = []
    for t in range(len(window)):
        distances = [
            t - s for s in range(NGRAM - 1, t) if window[s - NGRAM + 1 : s + 1] == window[t - NGRAM + 1 : t + 1]
        ]
        found.append(min(distances, default=0))
    return found


@given(st.lists(st.integers(0, 2), max_size=80))
def test_the_distance_is_that_to_the_last_place_of_the_same_bytes(window: list[int]) -> None:
    assert occurrence_distances(window) == by_brute_force(window)


def test_distances_of_a_known_text() -> None:
    assert occurrence_distances(list(b"abcdabcd")) == [0] * 7 + [4]
    assert occurrence_distances(list(b"aaaaaa")) == [0, 0, 0, 0, 1, 1]


def test_targets_fall_in_octaves_and_sums_count_each_once() -> None:
    windows = random_windows(3, tokens=2)
    bins = occurrence_bins(windows, SETTINGS)
    assert bins.shape == (3, 2 * L)  # the second half of windows of 4 L
    for row, window in zip(bins.tolist(), windows.tolist(), strict=True):
        for octave, distance in zip(row, by_brute_force(window)[-2 * L :], strict=True):
            if distance:
                assert 2**octave <= distance < 2 ** (octave + 1)
            else:
                assert octave == SETTINGS.bins
    ones = torch.tensor(sums_by_bin(torch.ones(bins.shape), bins, SETTINGS.bins + 1))
    assert ones.sum(0).tolist() == torch.bincount(bins.flatten(), minlength=SETTINGS.bins + 1).tolist()
    assert ones.sum(1).tolist() == [2 * L] * 3
    third = torch.where(bins == 3, 7.0, 0.0)
    assert torch.tensor(sums_by_bin(third, bins, SETTINGS.bins + 1)).nonzero()[:, 1].unique().tolist() == [3]


@pytest.mark.parametrize(("longest", "bins"), [(2, 5), (4, 6), (8, 7)])
def test_there_are_bins_for_every_distance_in_a_window(longest: int, bins: int) -> None:
    settings = Settings(L, 2, longest, 4, "", 0.2, 4.0, {})
    assert settings.bins == bins
    assert (longest * L - 1).bit_length() - 1 == bins - 1


# --- resolution ------------------------------------------------------------------------------------------------------


def test_resolution_of_a_known_example() -> None:
    # weights 4, 2, 1: (4 (4 - 2) + 2 (2 - 1)) / 7^2
    scores = torch.tensor([[4.0, 2.0, 1.0], [1.0, 2.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    expected = [10 / 49, (-1 - 4) / 49, 0]
    assert resolution(scores).tolist() == pytest.approx(expected, abs=1e-15)
    assert resolution(scores + 1000).tolist() == pytest.approx(expected, abs=1e-12)  # no overflow


def test_a_row_that_ends_in_nan_has_the_resolution_of_what_comes_before() -> None:
    scores = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    ended = torch.cat((scores, torch.full((2, 3), math.nan)), 1)
    rounding = 16 * torch.finfo(torch.float64).eps  # of sums of seven terms, in another order
    torch.testing.assert_close(resolution(ended), resolution(scores), rtol=0, atol=rounding)


@torch.no_grad()
def by_hand(model: Transformer, tokens: Tensor, encoding: Encoding | None) -> list[list[list[float]]]:
    """Each visible pair's logit by the float64 formula; means by layer, head and distance."""
    x, n = model.embedding(tokens), tokens.shape[1]
    at = torch.arange(n)
    layers: Any = model.layers
    means = []
    for layer in layers:
        block, normed = layer.attention, layer.attention_norm(x)
        d, mask, means_of_heads = block.head_dim, visible(n, block.block_size), []
        for h in range(block.num_heads):
            g = h * block.num_kv_heads // block.num_heads
            q = block.q_proj(normed)[..., h * d : (h + 1) * d]
            k = block.k_proj(normed)[..., g * d : (g + 1) * d]
            logits = q @ k.mT if encoding is None else scores(q, k, at, at, encoding, mask)
            found: dict[int, list[float]] = {}
            for row in logits / math.sqrt(d):
                for query, key in mask.nonzero().tolist():
                    found.setdefault(query - key, []).append(float(row[query, key]))
            means_of_heads.append([math.fsum(found[each]) / len(found[each]) for each in sorted(found)])
        means.append(means_of_heads)
        x = layer(x)
    return means


@pytest.mark.parametrize(("block_size", "farthest"), [(None, [17, 17]), (4, [8, 8]), ([4, None], [8, 17])])
@pytest.mark.parametrize(
    ("positions", "encoding"),
    [
        (partial(XPOS, scale_base=8), Encoding(8)),
        (RotaryEmbedding, Encoding()),
        (NoPositions, None),
    ],
)
def test_expected_scores_are_the_means_of_the_models_own_logits(
    positions: Any, encoding: Encoding | None, block_size: Any, farthest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.context_use, "QUERIES_AT_ONCE", 5)
    torch.manual_seed(0)
    options: Any = {"num_kv_heads": 2, "positions": positions, "block_size": block_size}
    model = Transformer(256, 32, 2, 4, **options).double().eval()
    for parameter in model.parameters():
        parameter.data *= 5
    tokens = random_windows(2, 17)
    found = expected_scores(model, tokens)
    assert found.shape == (2, 4, max(farthest))
    for layer, means, seen in zip(found, by_hand(model, tokens, encoding), farthest, strict=True):
        expected = torch.tensor(means, dtype=torch.float64)
        torch.testing.assert_close(layer[:, :seen], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
        assert layer[:, seen:].isnan().all()
    assert not any(each._forward_pre_hooks for each in model.attentions)


def test_expected_scores_of_alibi_hold_its_bias() -> None:
    torch.manual_seed(0)
    model = Transformer(256, 16, 1, 2, positions=partial(ALiBi, num_heads=2)).double().eval()
    for parameter in model.attentions[0].q_proj.parameters():
        parameter.data *= 0
    found = expected_scores(model, random_windows(1, 9))
    assert found.tolist() == [[[-slope * distance for distance in range(9)] for slope in (2**-4, 2**-8)]]


# --- whole measurements ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xpos seeds 1 and 2, and rotary seed 1, in runs/."""
    return train_runs(tmp_path_factory.mktemp("trained"), ("xpos", 1), ("xpos", 2), ("rotary", 1))


def measured(trained: Path, output: Path, *names: str, **changes: Any) -> dict[str, Any]:
    context_use(
        [str(trained / name) for name in names or ("xpos", "rotary")],
        **{"output": str(output), "longest": 4, "windows": 4, "device": "cpu"} | changes,
    )
    return json.loads((output / "results.json").read_text())


def test_a_measurement_prints_a_table_and_writes_json_markdown_and_plots(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = measured(trained, tmp_path / "out")
    printed = capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert [(c["encoding"], c["seed"], c["mode"]) for c in results["cells"]] == [
        (encoding, seed, mode) for mode in MODES for encoding, seed in (("xPos", 1), ("xPos", 2), ("RoPE", 1))
    ]
    for cell in results["cells"]:
        assert list(cell["losses"]) == ["absent", "intact", "shuffled", "replaced"]
        assert {len(losses) for losses in cell["losses"].values()} == {4}
        assert bool(cell["resolution"]) == (cell["mode"] in ("dense", "BCA"))
        row = f"| {cell['encoding']}, {cell['label']} "
        assert printed.count(row) == 1
        assert report.count(row) == (4 if cell["resolution"] else 2)
    assert "4 windows of 4 L from " in printed
    for plot in ("context_use.png", "occurrence.png", "resolution.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"]({plot})" in report
    assert not list((tmp_path / "out").glob("*.draft"))


def test_up_to_the_trained_length_blocks_of_half_of_it_see_as_much_as_dense_attention(
    trained: Path, tmp_path: Path
) -> None:
    cells = {(c["seed"], c["mode"]): c for c in measured(trained, tmp_path / "out", "xpos")["cells"]}
    for seed in (1, 2):
        dense, blockwise = cells[seed, "dense"], cells[seed, "BCA"]
        assert dense["losses"]["absent"] == pytest.approx(blockwise["losses"]["absent"], rel=1e-6)
        for context in ("4", "8", "16"):  # up to L
            assert dense["resolution"][context] == pytest.approx(blockwise["resolution"][context], rel=1e-4, abs=1e-9)


def test_cells_hold_the_losses_of_the_last_bytes_and_of_the_second_half(trained: Path, tmp_path: Path) -> None:
    results = measured(trained, tmp_path / "out", "rotary")
    (run,) = find_runs([str(trained / "rotary")])
    windows, names = choose_windows(run.text().documents("test"), 4 * L + 1, 4)
    assert results["documents"] == names
    cells = {cell["mode"]: cell for cell in results["cells"]}
    model = run.model(torch.device("cpu"))
    for mode, block_size in (("dense", None), ("BCA", L // 2)):
        model.block_size = block_size
        for condition, version in far_versions(windows, names, L).items():
            expected = token_losses(model, version)[:, -(L // 2) :].mean(1).tolist()
            assert cells[mode]["losses"][condition] == pytest.approx(expected, rel=1e-5)
        expected = token_losses(model, windows)[:, -2 * L :].sum(1).tolist()
        assert list(map(math.fsum, cells[mode]["sums_by_distance"])) == pytest.approx(expected, rel=1e-5)


def test_the_report_holds_the_measured_numbers(trained: Path, tmp_path: Path) -> None:
    results = measured(trained, tmp_path / "out", "rotary")
    (dense,) = [cell for cell in results["cells"] if cell["mode"] == "dense"]
    report = (tmp_path / "out" / "report.md").read_text()
    row = next(line for line in report.splitlines() if line.startswith("| RoPE, dense "))
    entries = [entry.strip() for entry in row.strip("|").split("|")]
    mean = {condition: math.fsum(losses) / 4 for condition, losses in dense["losses"].items()}
    assert entries[1] == f"{mean['absent']:.3f}"
    assert float(entries[2].split()[0]) == pytest.approx(mean["intact"] - mean["absent"], abs=6e-5)
    assert float(entries[6].split()[0]) == pytest.approx(mean["intact"] - mean["replaced"], abs=6e-5)
    total = sum(map(math.fsum, dense["sums_by_distance"]))
    targets, losses = (
        [entry.strip() for entry in line.strip("|").split("|")][1:]
        for line in report.split("## Last occurrence")[1].split("## Attention")[0].splitlines()
        if line.startswith(("| targets ", "| RoPE, dense "))
    )
    counts = list(map(int, targets))
    assert sum(counts) == 4 * 2 * L
    reported = math.fsum(n * float(loss) for n, loss in zip(counts, losses, strict=True))
    assert reported == pytest.approx(total, abs=6e-4 * sum(counts))
    assert "With one seed they say nothing about another training." in report


def test_an_interrupted_measurement_goes_on_where_it_was_and_ends_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(trained, tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls_of_measure(patch, train.context_use, last=5)
        with pytest.raises(InterruptionError):
            measured(trained, tmp_path / "out")
    calls = calls_of_measure(monkeypatch, train.context_use)
    measured(trained, tmp_path / "out")
    assert len(calls) == 12 - 5
    for name in ("results.json", "report.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    measured(trained, tmp_path / "out")
    assert len(calls) == 12 - 5


def test_results_with_other_settings_are_left_alone(trained: Path, tmp_path: Path) -> None:
    measured(trained, tmp_path / "out", "rotary")
    with pytest.raises(UserError, match=r"tail 2.0 there, 3.0 here.*give another --output, or remove it"):
        measured(trained, tmp_path / "out", "rotary", tail=3.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        *WRONG_ARGUMENTS,
        (["{runs}", "--longest", "3"], "longest must be a power of two and 2 or above, got 3"),
        (["{runs}", "--longest", "1"], "longest must be a power of two and 2 or above, got 1"),
        (["{runs}", "--windows", "1"], "windows must be 2 or above, got 1"),
        (["{runs}", "--windws", "3"], "unrecognized arguments: --windws 3; did you mean windows?"),
        (["{runs}", "--longest", "256"], "no held-out document has the 4097 tokens that a window takes"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line_and_leaves_nothing(
    args: list[str], message: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    given = [arg.format(runs=trained) for arg in args]
    assert message in complaint_of(main, [*given, "--output", str(output)], capfd)
    assert not output.exists()


def test_a_corpus_of_one_held_out_document_is_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rng = random.Random(0)
    for i in range(40):  # one of those that are held out is long enough for a window
        (corpus / f"{i}.txt").write_text(
            "".join(rng.choice("ab ") for _ in range(400 if i == long_test_file() else 60))
        )
    run = fit(tmp_path, trainer__max_steps=2)
    line = complaint_of(main, [str(run), "--longest=4", "--output", str(tmp_path / "out")], capfd)
    assert line.startswith("windows must come from two documents at least")
    assert not (tmp_path / "out").exists()


def long_test_file() -> int:
    from train.text import split_of

    return next(i for i in range(40) if split_of(f"{i}.txt", 0.05, 0.1) == "test")
