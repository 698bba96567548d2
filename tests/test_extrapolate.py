"""Loss against context length: the same targets at every context, in modes that leave the model as it was trained."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LAST, complaint_of, fit, options, random_windows, read_checkpoint, sharpened
from torch import Tensor

import train.extrapolate
from train.__main__ import main
from train.data import Document, TextData
from train.errors import UserError, command
from train.extrapolate import (
    binned,
    choose_windows,
    extrapolate,
    held_out,
    losses_of,
    measure_loss,
    pieced_losses,
    token_losses,
)
from train.measure import octaves
from train.modes import Mode, discounted, standard_modes
from train.runs import find_runs
from xpos_zoo import XPOS, LogNScaling, RotaryEmbedding, ScaleInvariant, SoftTail, Transformer
from xpos_zoo.visibility import AttentionPattern

L = 16
TARGETS = L // 2
CONTEXTS = octaves(L, 8)
MODES = {mode.name: mode for mode in standard_modes(L, log_n=0.3)}
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a logit, the sum over the vocabulary, and the loss


def model(layers: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    return sharpened(Transformer(256, 16, layers, 2, **options))


def targets_of(predict: Any, windows: Tensor, context: int) -> Tensor:
    return pieced_losses(predict, windows[:, -max(context, TARGETS) - 1 :], context)[:, -TARGETS:]


@torch.no_grad()
def by_hand(model: Callable[[Tensor], Tensor], window: Tensor, context: int, recompute: bool) -> list[float]:
    """Each of the last targets, predicted on its own from the tokens that it may be predicted from."""
    context = min(context, L) if recompute else context
    losses = []
    for j in range(TARGETS):
        at = len(window) - TARGETS + j
        begin = len(window) - 1 - (context if context >= TARGETS else TARGETS - j // context * context)
        scores = model(window[None, begin:at])[0, -1].double()
        losses.append(float(scores.logsumexp(0) - scores[window[at]]))
    return losses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", [partial(XPOS, scale_base=8), RotaryEmbedding])
def test_every_target_is_predicted_from_the_context_alone(positions, mode, monkeypatch):
    monkeypatch.setattr(train.extrapolate, "TOKENS_AT_ONCE", 3 * L)  # nor do losses depend on what goes together
    transformer, chosen = model(positions=positions), MODES[mode]
    chosen.set_on(transformer)
    predict = partial(token_losses, transformer, recompute=L // 2 if chosen.recompute else None)
    windows = random_windows(2, 8 * L + 1)
    for context in CONTEXTS:
        found = targets_of(predict, windows, context)
        expected = torch.tensor([by_hand(transformer, window, context, chosen.recompute) for window in windows])
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.max()))


@pytest.mark.parametrize("length", [4, 16])
def test_blockwise_targets_see_the_same_number_of_keys_from_the_trained_length_on(length):
    block_size = next(mode.block_size for mode in standard_modes(length) if mode.name == "BCA")
    assert block_size is not None
    seen = []
    for context in octaves(length, 64)[2:]:
        at = torch.arange(context)
        seen.append((at + 1 - AttentionPattern(block_size).start(at))[-length // 2 :].tolist())
    assert all(keys == seen[0] for keys in seen)
    assert sorted({keys % block_size for keys in seen[0]}) == list(range(block_size))  # every phase of a block once


def test_a_position_module_is_rescaled_for_each_context_from_the_trained_one():
    def slower(rotary: RotaryEmbedding, scale: float) -> dict[str, RotaryEmbedding]:
        return {"positions": RotaryEmbedding(rotary.head_dim, base=rotary.base * scale)}

    windows, found = random_windows(2, 8 * L + 1), []
    for mode in (MODES["dense"], Mode("slower", "slower", rescale=slower)):
        losses = losses_of(model(positions=RotaryEmbedding), mode, windows, L)["loss"]
        found.append({context: losses["loss"][losses["context"] == context].mean() for context in CONTEXTS})
    plain, rescaled = found
    assert [context for context in CONTEXTS if plain[context] == rescaled[context]] == [4, 8, 16]
    alone = token_losses(model(positions=partial(RotaryEmbedding, base=40000.0)), windows[:, -4 * L - 1 :])
    assert rescaled[4 * L] == pytest.approx(float(alone[:, -TARGETS:].mean()), rel=1e-6)


def test_the_papers_own_table_is_of_pieces_that_do_not_overlap():
    transformer, windows = model(layers=1), random_windows(2, 8 * L + 1)
    chunked = losses_of(transformer, MODES["BCA"], windows, L)["chunked"]["loss"].tolist()
    for context, loss in zip(CONTEXTS, chunked, strict=True):
        pieces = [token_losses(transformer, windows[:, at : at + context + 1]) for at in range(0, 8 * L, context)]
        assert loss == pytest.approx(float(torch.cat(pieces, 1).mean()), rel=1e-5)


def test_losses_by_position_are_in_bins_of_half_an_octave_that_end_at_powers_of_two():
    bins = binned([float(position) for position in range(1, 2001)])
    ends = bins["tokens"].cumsum()
    first = ends - bins["tokens"] + 1
    assert ({2**k for k in range(11)} | {2000}) <= set(ends)
    assert bins["loss"].tolist() == pytest.approx(((first + ends) / 2).tolist())
    assert bins["position"].tolist() == pytest.approx(((first * ends) ** 0.5).tolist())


def test_a_mode_leaves_what_a_model_was_trained_with():
    own = {"block_size": 4, "query_scaling": LogNScaling(0.5, 8), "distance_bias": SoftTail(1.0, 8)}
    for mode in MODES.values():
        trained: Any = Transformer(256, 16, 2, 2)
        first, second = trained.attentions
        for name, value in own.items():
            setattr(first, name, value)
        mode.set_on(trained)
        for name, value in own.items():
            assert getattr(first, name) is value
            assert getattr(second, name) is getattr(mode, name)


def test_a_discount_is_for_models_with_scale_invariant_logits_and_keeps_their_tau():
    mode, model = discounted(L, 1.5), Transformer(256, 16, 2, 2)
    taken = {"name": "ScaleInvariant", "tau": 3.0, "discount": 0.0, "trained_length": None}
    for bias, takes in (
        (taken, True),
        (None, False),
        ([taken, None], False),
        ([taken, taken], True),
        (taken | {"discount": 2.0}, False),
        ({"name": "SoftTail"}, False),
    ):
        assert mode.takes({"distance_bias": bias}) == takes
    model.distance_bias = [ScaleInvariant(3.0), ScaleInvariant()]
    mode.set_on(model)
    assert model.distance_bias == [ScaleInvariant(3.0, 1.5, L), ScaleInvariant(10.0, 1.5, L)]


def documents(*sizes: int) -> list[Document]:
    starts = np.cumsum((0, *sizes))
    return [
        Document(f"d{i}", np.arange(a, a + n, dtype=np.uint16))
        for i, (a, n) in enumerate(zip(starts[:-1], sizes, strict=True))
    ]


def test_windows_come_from_as_many_documents_as_there_are_and_never_overlap():
    given = documents(30, 9, 10, 25)
    windows, names = choose_windows(given, 10, 100)
    assert names == ["d0", "d2", "d3", "d0", "d3", "d0"]  # each once, before any a second time; d1 is too short
    tokens = windows.flatten().tolist()
    assert len(tokens) == len(set(tokens)) == 60
    sources = {document.name: document.tokens.tolist() for document in given}
    for name, window in zip(names, windows.tolist(), strict=True):
        start = sources[name].index(window[0])
        assert window == sources[name][start : start + 10]
        assert start % 10 == len(sources[name]) % 10 // 2  # as much is left over at both ends
    fewer, their_names = choose_windows(given, 10, 4)
    assert torch.equal(fewer, windows[:4])
    assert their_names == names[:4]
    with pytest.raises(UserError, match="no held-out document has the 31 tokens of a window, the longest has 30"):
        choose_windows(given, 31, 4)


@pytest.mark.slow
def test_a_measurement_prints_a_table_and_writes_json_markdown_and_a_plot(runs, tmp_path, capsys):
    results = extrapolate([str(runs)], str(tmp_path / "out"), longest=4, windows=6)
    printed, report = capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()
    losses = results.tables["loss"]
    assert len(losses) == 6 * 3 * 5 * 6  # modes, runs, contexts, windows
    for mode in standard_modes(L):
        for encoding in ("xPos", "RoPE"):
            row = f"| {encoding}, {mode.label} "
            assert printed.count(row) == 1
            # nats, difference, perplexity, bits; and the paper's own table
            assert report.count(row) == 4 + (mode.name in ("dense", "BCA"))
    mean = losses.query("encoding == 'xPos' and mode == 'dense' and context == 64")["loss"].mean()
    nats, _, perplexity, bits, *_ = [line for line in report.splitlines() if line.startswith("| xPos, dense  ")]
    assert nats in printed
    for row, entry in ((nats, mean), (perplexity, math.exp(mean)), (bits, mean / math.log(2))):
        assert float(row.split("|")[-2].split()[0]) == pytest.approx(entry, abs=0.006)
    assert "held-out documents, seeds [1, 2]; trained at L = 16 for 8 steps" in printed
    assert (tmp_path / "out" / "extrapolation.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert str(tmp_path / "out" / "extrapolation.png") in printed


def test_a_model_trained_longer_is_measured_on_the_targets_of_the_shorter_length(runs, tmp_path):
    found = find_runs([runs / "xpos"])[:1]
    results = measure_loss(found, standard_modes(L)[:1], tmp_path / "half.json", 4, 3, length=L // 2)
    assert results.length == L // 2
    windows, _ = held_out(found[:1], 2, 3)  # as long
    for context, group in results.tables["loss"].query(f"context >= {L // 4}").groupby("context"):
        expected = token_losses(found[0].model(torch.device("cpu")), windows[:, -context - 1 :])[:, -(L // 4) :]
        assert group["loss"].tolist() == pytest.approx(expected.mean(1).tolist(), abs=1e-5)


def test_a_wrong_argument_is_told_in_one_line_and_leaves_nothing(runs, tmp_path, capfd):
    for option, message in (
        ("--longest=3", "longest a power of two, got 24 and 3"),
        ("--windows=0", "windows must be above 0, and longest a power of two, got 0 and 64"),
        ("--log_n=-1", "log_n, tail or discount: coefficient must be 0 or above and finite, got -1"),
        ("--tail=.inf", "log_n, tail or discount: power must be 0 or above and finite, got inf"),
        ("--discount=-1", "log_n, tail or discount: discount must be 0 or above and finite, got -1"),
        ("--modes=[discount]", "modes: discount must fit one of the runs"),
        ("--modes=[loose]", "loose"),
    ):
        args = [str(runs), option, "--output", str(tmp_path / "out")]
        assert message in complaint_of(partial(command, extrapolate), args, capfd)
        assert not (tmp_path / "out").exists()


def change_held_out(corpus: Path) -> None:
    for path in corpus.iterdir():
        path.write_text("or not " * 20 + path.read_text())


def change_training(corpus: Path) -> None:
    held_out = {each.name for split in ("val", "test") for each in TextData(16, [str(corpus)]).documents(split)}
    next(path for path in corpus.iterdir() if path.name not in held_out).write_text("not held out")


def forget_hashes(content: dict[str, Any]) -> None:
    for name in ("held_out_sha256", "earlier_texts"):
        del content["TextData"][name]


@pytest.mark.parametrize(
    ("change", "edit", "refused", "note"),
    [
        (lambda corpus: None, lambda content: None, "", ""),
        (change_training, lambda content: None, "", ""),
        (change_held_out, lambda content: None, "the text has changed since", "the text has changed since"),
        (lambda corpus: None, forget_hashes, "", ""),  # of 0.2.0
        (change_held_out, forget_hashes, "", "cannot say whether the test text was held out"),
    ],
)
def test_text_is_measured_as_held_out_if_it_was_and_otherwise_only_if_told_to(
    change, edit, refused, note, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    run = fit(tmp_path, trainer__max_steps=1)
    content = read_checkpoint(run)
    edit(content)
    torch.save(content, run / LAST)
    change(tmp_path / "corpus")
    small = [str(run), "--longest=2", "--windows=2", "--modes=[dense]", "--output=out"]
    testing = ["test", *options(tmp_path, trainer__max_steps=1)]
    told = ["--allow_changed_text=true"] if refused else []
    if refused:
        assert refused in complaint_of(partial(command, extrapolate), small, capfd)
        assert not Path("out").exists()
        assert refused in complaint_of(main, testing, capfd)
    command(extrapolate, [*small, *told])
    notes = json.loads(Path("out/results.json").read_text())["settings"].get("notes", [])
    assert [note in each for each in notes] == [True] * bool(note)
    assert note in Path("out/report.md").read_text()
    capfd.readouterr()
    main([*testing, *told])
    shown = capfd.readouterr().out
    assert note in shown
    assert ("note: " in shown) == bool(note)


def test_what_a_run_was_trained_on_before_is_known_to_the_run_that_began_from_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    first = fit(tmp_path, trainer__max_steps=1)
    cases: list[tuple[str, dict[str, Any], bool]] = [("same", {}, False), ("cut", {"data__test_fraction": 0.4}, True)]
    for name, changes, refused in cases:
        run = fit(tmp_path, name=name, checkpoint=first, **changes)
        args = [str(run), "--longest=2", "--windows=2", "--modes=[dense]", f"--output={name}"]
        if refused:
            line = complaint_of(partial(command, extrapolate), args, capfd)
            assert "the run began from one of another text" in line
        else:
            command(extrapolate, args)
