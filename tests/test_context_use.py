"""What a model makes of far context: made-up text and models whose answers are known, then tiny trained runs."""

import math
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Encoding, scores, visible
from tiny import random_windows, sharpened
from torch import Tensor

import study.context_use
from study.context_use import (
    NGRAM,
    attention_inputs,
    attention_shares,
    by_occurrence,
    context_use,
    expected_scores,
    far_versions,
    logits_in_chunks,
    occurrence_distances,
    resolution,
)
from study.encodings import NoPositions
from train.errors import UserError
from train.extrapolate import held_out, token_losses
from train.measure import read_cells, results_of
from train.runs import find_runs
from xpos_zoo import (
    XPOS,
    ALiBi,
    MultiHeadAttention,
    RotaryEmbedding,
    ScalableSoftmax,
    ScaleInvariant,
    Transformer,
    plan_attention,
)

L = 16
NAMES = ["a", "b", "b", "c"]


def test_versions_differ_in_far_text_alone():
    windows = random_windows(4, 4 * L + 1)
    versions = far_versions(windows, NAMES, L)
    assert list(versions) == ["absent", "intact", "shuffled", "replaced"]
    for version in versions.values():
        assert torch.equal(version[:, -L - 1 :], windows[:, -L - 1 :])  # the last L inputs, and the last target
    assert versions["absent"].shape[1] == L + 1
    assert torch.equal(versions["intact"], windows)
    far, shuffled = slice(0, 3 * L), versions["shuffled"]
    assert torch.equal(shuffled[:, far].sort(1).values, windows[:, far].sort(1).values)
    assert (shuffled[:, far] != windows[:, far]).float().mean() > 0.9
    assert torch.equal(versions["replaced"][:, far], windows[[1, 3, 3, 0], far])
    assert torch.equal(far_versions(windows, NAMES, L)["shuffled"], shuffled)
    same = far_versions(torch.arange(4 * L + 1).repeat(2, 1), ["a", "b"], L)["shuffled"]
    assert not torch.equal(same[0], same[1])  # each in its own way
    with pytest.raises(UserError, match="windows must come from two documents"):
        far_versions(windows, ["a"] * 4, L)


@pytest.mark.parametrize("size", [L // 2, 2 * L])
def test_far_text_changes_nothing_for_a_model_whose_window_ends_before_it(size):
    torch.manual_seed(0)
    model = sharpened(Transformer(256, 16, 1, 2))  # one layer, so that nothing is handed on
    model.window_size = size
    versions = far_versions(random_windows(4, 4 * L + 1), NAMES, L)
    losses = {condition: token_losses(model, version)[:, -L // 2 :] for condition, version in versions.items()}
    for condition in ("shuffled", "replaced"):
        assert torch.equal(losses[condition], losses["intact"]) == (size == L // 2)
    if size == L // 2:  # the first target's query has L/2 keys and its own
        torch.testing.assert_close(losses["absent"], losses["intact"], rtol=1e-5, atol=1e-5)


def by_brute_force(window: list[int]) -> list[int]:
    grams = [tuple(window[max(0, t + 1 - NGRAM) : t + 1]) for t in range(len(window))]
    return [min((t - s for s in range(NGRAM - 1, t) if grams[s] == grams[t]), default=0) for t in range(len(window))]


@given(st.lists(st.integers(0, 2), max_size=80))
def test_the_distance_is_that_to_the_last_place_of_the_same_bytes(window):
    assert occurrence_distances(window) == by_brute_force(window)
    assert occurrence_distances(list(b"abcdabcd")) == [0] * 7 + [4]


def test_losses_are_averaged_in_octaves_of_the_distance():
    windows = random_windows(3, 4 * L + 1, tokens=2)
    losses = torch.rand(3, 4 * L, generator=torch.Generator().manual_seed(2))
    expected: dict[int, list[float]] = {}
    for row, window in zip(losses.tolist(), windows.tolist(), strict=True):
        for loss, distance in zip(row[-2 * L :], by_brute_force(window)[-2 * L :], strict=True):
            expected.setdefault(2 ** (distance.bit_length() - 1) if distance else 0, []).append(loss)
    found = by_occurrence(losses, windows)
    assert found["distance"].tolist() == sorted(expected)
    for distance, tokens, loss in found.itertuples(index=False):
        assert tokens == len(expected[distance])
        assert loss == pytest.approx(math.fsum(expected[distance]) / tokens)


def test_resolution_of_a_known_example() -> None:
    # weights 4, 2, 1: (4 (4 - 2) + 2 (2 - 1)) / 7^2
    rows = torch.tensor([[4.0, 2.0, 1.0], [1.0, 2.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    expected = pytest.approx([10 / 49, (-1 - 4) / 49, 0], abs=1e-12)
    assert resolution(rows).tolist() == expected
    assert resolution(rows + 1000).tolist() == expected  # no overflow
    ended = torch.cat((rows, torch.full((3, 2), math.nan)), 1)
    assert resolution(ended).tolist() == expected


@torch.no_grad()
def by_hand(model: Transformer, tokens: Tensor, encoding: Encoding) -> list[list[list[float]]]:
    """Each visible pair's logit by the float64 formula; means by layer, head and distance."""
    x, n = model.embedding(tokens), tokens.shape[1]
    at, means, layers = torch.arange(n), [], cast(Any, model.layers)
    for layer in layers:
        block, normed = layer.attention, layer.attention_norm(x)
        d, mask, means_of_heads = block.head_dim, visible(n, block.block_size), []
        for h in range(block.num_heads):
            g = h * block.num_kv_heads // block.num_heads
            q, k = block.q_proj(normed)[..., h * d : (h + 1) * d], block.k_proj(normed)[..., g * d : (g + 1) * d]
            found: dict[int, list[float]] = {}
            for row in scores(q, k, at, at, encoding, mask) / math.sqrt(d):
                for query, key in mask.nonzero().tolist():
                    found.setdefault(query - key, []).append(float(row[query, key]))
            means_of_heads.append([math.fsum(found[each]) / len(found[each]) for each in sorted(found)])
        means.append(means_of_heads)
        x = layer(x, *plan_attention([block], x))
    return means


@pytest.mark.parametrize(("block_size", "farthest"), [(None, [17, 17]), ([4, None], [8, 17])])
@pytest.mark.parametrize(
    ("positions", "encoding"), [(partial(XPOS, scale_base=8), Encoding(8)), (RotaryEmbedding, Encoding())]
)
def test_expected_scores_are_the_means_of_the_models_own_logits(positions, encoding, block_size, farthest, monkeypatch):
    monkeypatch.setattr(study.context_use, "QUERIES_AT_ONCE", 5)
    torch.manual_seed(0)
    model = sharpened(Transformer(256, 32, 2, 4, num_kv_heads=2, positions=positions, block_size=block_size))
    tokens = random_windows(2, 17)
    found = expected_scores(model, tokens)
    for layer, means, seen in zip(found, by_hand(model, tokens, encoding), farthest, strict=True):
        expected = torch.tensor(means, dtype=torch.float64)
        torch.testing.assert_close(layer[:, :seen], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
        assert layer[:, seen:].isnan().all()


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize(
    ("positions", "scaling", "bias"),
    [
        (NoPositions, None, ALiBi(4)),
        (partial(XPOS, scale_base=8, max_wavelength=20), ScalableSoftmax(10), None),
        (partial(XPOS, scale_base=8), None, ScaleInvariant(3)),
    ],
)
@torch.inference_mode()
def test_what_is_told_of_attention_is_what_layers_attend_with(positions, scaling, bias, block_size, monkeypatch):
    monkeypatch.setattr(study.context_use, "QUERIES_AT_ONCE", 5)
    torch.manual_seed(0)
    settings = {"block_size": block_size, "query_scaling": scaling, "distance_bias": bias}
    block = MultiHeadAttention(32, 4, num_kv_heads=2, positions=positions, **settings).double()
    x = 3 * torch.randn(2, 33, 32, dtype=torch.float64)
    v = block.v_proj(x).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
    found = [logits.softmax(-1) @ v[:, :, : logits.shape[-1]] for logits, _ in logits_in_chunks(block, x, 16)]
    expected = block(x)[:, -16:]
    actual = block.out_proj(torch.cat(found, 2).transpose(1, 2).flatten(2))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))  # biases are float32


@torch.inference_mode()
def test_shares_of_attention_by_octave_are_the_sums_of_weights_there():
    torch.manual_seed(0)
    model = sharpened(Transformer(256, 32, 2, 4, positions=RotaryEmbedding))
    tokens = random_windows(2, 17)
    frame: Any = attention_shares(model, tokens, 8)
    shares = frame.groupby(["layer", "head", "distance"])["share"].mean().unstack()
    assert list(shares.columns) == [0, 1, 2, 4, 8, 16]
    block, x = attention_inputs(model, tokens)[1]
    ((logits, distance),) = logits_in_chunks(block, x, 8)
    expected = (logits.softmax(-1) * ((distance >= 4) & (distance < 8))).sum(-1).mean((0, 2))
    assert shares.loc[1, 4].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert shares.sum(axis=1).tolist() == pytest.approx([1.0] * 8)


@pytest.mark.slow
def test_cells_hold_the_losses_of_the_last_targets_and_the_table_their_differences(runs, tmp_path, capsys):
    context_use([str(runs)], str(tmp_path), longest=4, windows=4)
    results = results_of(*read_cells(tmp_path / "results.json"))
    (run,) = find_runs([runs / "rotary"])
    windows, settings = held_out([run], 4, 4)
    model = run.model(torch.device("cpu"))
    far = results.tables["far"].query("encoding == 'RoPE' and mode == 'BCA'").set_index("far")["loss"]
    model.block_size = L // 2
    mean = {}
    for condition, version in far_versions(windows, settings["documents"], L).items():
        expected = token_losses(model, version)[:, -(L // 2) :].mean(1)
        assert far[condition].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        mean[condition] = float(expected.mean())
    assert set(results.tables["resolution"]["mode"]) == {"dense", "BCA"}
    assert set(results.tables["resolution"]["context"]) == {4, 8, 16, 32, 64}
    assert (results.tables["occurrence"].groupby(["mode", "encoding", "seed"])["tokens"].sum() == 4 * 2 * L).all()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| RoPE, BCA")]
    absent, intact = row.split("|")[2:4]
    assert absent.strip() == f"{mean['absent']:.3f}"
    assert float(intact.split()[0]) == pytest.approx(mean["intact"] - mean["absent"], abs=6e-5)
