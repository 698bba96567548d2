"""The measurement: same targets at every context, cells that are measured once, and one line for each bad input."""

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    WRONG_ARGUMENTS,
    InterruptionError,
    calls_of_measure,
    complaint_of,
    copy_of_run,
    fit,
    train_runs,
    write_corpus,
)
from torch import Tensor, nn
from tqdm import tqdm

import train.extrapolate
from train.corpus import Document
from train.errors import UserError
from train.extrapolate import (
    STANDARD_MODES,
    Settings,
    all_modes,
    choose_windows,
    extrapolate,
    find_runs,
    main,
    measure,
    overlapped_losses,
    predictor,
    target_losses,
    token_losses,
)
from train.language_model import LanguageModel
from xpos_zoo import XPOS, RotaryEmbedding, Transformer
from xpos_zoo.plan import first_seen

pytestmark = pytest.mark.usefixtures("few_replicates")

L = 16
SETTINGS = Settings(L, steps=2, longest=8, windows=3, text_sha256="", temperature=0.3, tail=2.0, data={})
MODES = {name: mode for name, mode in all_modes(L, 0.3).items() if name in STANDARD_MODES}


class Bigram(nn.Module):
    """Predicts from the last token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def random_windows(count: int = 3, length: int = 8 * L + 1) -> Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(
    model: Callable[[Tensor], Tensor], window: Tensor, context: int, targets: int, recompute: bool = False
) -> list[float]:
    """Each of the last `targets` tokens, predicted on its own from the tokens that it may be predicted from."""
    if recompute:
        context = min(context, 2 * targets)
    losses = []
    for j in range(targets):
        at = len(window) - targets + j
        begin = len(window) - 1 - (context if context >= targets else targets - j // context * context)
        assert 1 <= at - begin <= context
        scores = model(window[None, begin:at])[0, -1].double()
        losses.append(float(scores.logsumexp(0) - scores[window[at]]))
    return losses


# --- the measure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [XPOS, RotaryEmbedding])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", SETTINGS.contexts)
def test_every_target_is_predicted_from_the_context_alone(positions: Any, mode: str, context: int) -> None:
    torch.manual_seed(0)
    model = LanguageModel(L, positions, embed_dim=16, num_layers=2, num_heads=2).transformer.double().eval()
    for parameter in model.parameters():
        parameter.data *= 5  # so that what attention does shows
    predict = predictor(model, MODES[mode], L)
    windows = random_windows(2)
    found = target_losses(predict, windows, context, SETTINGS.targets)[:, -SETTINGS.targets :]
    expected = torch.tensor(
        [by_hand(model, window, context, SETTINGS.targets, MODES[mode].recompute) for window in windows]
    )
    # The measure takes its logits in float32: each of a logit, the sum over the vocabulary, and the loss rounds once.
    rounding = 8 * torch.finfo(torch.float32).eps * float(expected.max())
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("context", SETTINGS.contexts)
def test_a_model_without_memory_has_the_same_losses_at_every_context(context: int) -> None:
    predict = partial(token_losses, Bigram())  # type: ignore[arg-type]
    windows = random_windows()
    here, there = (
        target_losses(predict, windows, c, SETTINGS.targets)[:, -SETTINGS.targets :] for c in (context, 8 * L)
    )
    rounding = 8 * torch.finfo(torch.float32).eps  # of a sum over the vocabulary, in another order
    torch.testing.assert_close(here, there, rtol=rounding, atol=0)


def test_losses_do_not_depend_on_how_many_windows_go_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = partial(token_losses, Bigram())  # type: ignore[arg-type]
    windows = random_windows(7)
    whole = target_losses(predict, windows, 4 * L, SETTINGS.targets)
    for at_once in (1, 3 * L, 3 * (4 * L + 1)):
        monkeypatch.setattr(train.extrapolate, "TOKENS_AT_ONCE", at_once)
        rounding = 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(target_losses(predict, windows, 4 * L, L), whole, rtol=rounding, atol=0)


@pytest.mark.parametrize("length", [4, 16, 128])
def test_contexts_are_octaves_from_a_quarter_of_the_trained_length(length: int) -> None:
    settings = Settings(length, 2, 64, 3, "", 0.2, 2.0, {})
    assert settings.contexts == [length // 4, length // 2, *(length * 2**k for k in range(7))]


@pytest.mark.parametrize("length", [4, 16, 128])
def test_blockwise_targets_see_the_same_number_of_keys_from_the_trained_length_on(length: int) -> None:
    settings = Settings(length, 2, 64, 3, "", 0.2, 2.0, {})
    block_size = all_modes(length)["BCA"].block_size
    assert block_size is not None
    seen = [
        (at + 1 - first_seen(at, block_size))[-settings.targets :].tolist()
        for context in settings.contexts
        if context >= length
        for at in [torch.arange(context)]
    ]
    assert all(keys == seen[0] for keys in seen)
    assert sorted({keys % block_size for keys in seen[0]}) == list(range(block_size))  # every phase of a block once


def test_each_mode_attends_in_its_own_way() -> None:
    model = Transformer(256, 16, 1, 2).eval()
    windows = random_windows(1)
    alone = {
        name: target_losses(predictor(copy.deepcopy(model), mode, L), windows, 8 * L, L) for name, mode in MODES.items()
    }
    assert all(not torch.equal(alone["dense"], alone[name]) for name in MODES if name != "dense")


def test_a_mode_leaves_the_blocks_of_layers_that_were_trained_with_some() -> None:
    for name, mode in all_modes(L).items():
        model = Transformer(256, 16, 2, 2, block_size=[4, None])
        mode.set_on(model)
        assert model.block_size == [4, L // 2 if name == "BCA" else None], name


def test_a_sliding_window_over_blocks_of_another_phase_has_the_losses_of_the_whole() -> None:
    torch.manual_seed(0)
    model = Transformer(256, 16, 2, 2, block_size=[5, None]).double().eval()
    windows = random_windows(2)
    predict = predictor(model, all_modes(L)["sliding"], L)
    assert torch.equal(predict(windows), token_losses(model, windows))


def test_recomputed_tokens_never_have_less_than_half_nor_more_than_all_of_the_trained_length() -> None:
    model: Any = Transformer(256, 16, 1, 2).eval()
    windows = random_windows(2)
    half = L // 2
    found = overlapped_losses(model, windows, half)
    for p in range(8 * L):
        begin = 0 if p < L else (p - half) // half * half
        assert p < L or half <= p - begin < L
        expected = token_losses(model, windows[:, begin : p + 2])[:, -1]
        rounding = 16 * torch.finfo(torch.float32).eps * float(expected.max())
        torch.testing.assert_close(found[:, p], expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("length", [L, 12])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_sliding_window_is_measured_in_pieces_with_the_losses_of_the_whole(length: int, layers: int) -> None:
    torch.manual_seed(0)
    model = Transformer(256, 16, layers, 2).double().eval()
    for parameter in model.parameters():
        parameter.data *= 5  # so that what attention does shows
    windows = random_windows(2, 16 * length + 1)
    predict = predictor(model, all_modes(length)["sliding"], length)
    whole = token_losses(model, windows)
    rounding = 8 * torch.finfo(torch.float32).eps * float(whole.max())  # of the loss
    torch.testing.assert_close(predict(windows), whole, rtol=0, atol=rounding)


@pytest.mark.parametrize("name", ["NTK", "YaRN"])
def test_angles_are_rescaled_for_each_context_from_the_trained_ones(name: str) -> None:
    torch.manual_seed(0)
    positions: Any = RotaryEmbedding
    model = LanguageModel(L, positions, embed_dim=16, num_layers=2, num_heads=2).transformer.eval()
    for parameter in model.parameters():
        parameter.data *= 5  # so that what attention does shows
    windows = random_windows()
    mode, dense = all_modes(L)[name], MODES["dense"]
    plain = measure(model, dense, windows, SETTINGS, tqdm(disable=True))["losses"]
    original = [attention.positions for attention in model.attentions]
    rescaled = measure(model, mode, windows, SETTINGS, tqdm(disable=True))["losses"]
    assert [context for context in plain if plain[context] == pytest.approx(rescaled[context], rel=1e-6)] == [
        context for context in SETTINGS.contexts if context <= L
    ]
    for context in (2 * L, 8 * L):
        assert mode.rescale is not None
        for attention, positions in zip(model.attentions, original, strict=True):
            attention.positions = mode.rescale(positions, context / L)
        alone = target_losses(partial(token_losses, model), windows, context, SETTINGS.targets)
        assert rescaled[context] == alone[:, -SETTINGS.targets :].mean(1).tolist()


def test_the_papers_own_table_is_of_pieces_that_do_not_overlap() -> None:
    model = Transformer(256, 16, 1, 2).eval()
    windows = random_windows(2)
    chunked = measure(model, MODES["BCA"], windows, SETTINGS, tqdm(disable=True))["chunked"]
    predict = predictor(model, MODES["BCA"], L)
    for context in SETTINGS.contexts:
        pieces = [predict(windows[:, begin : begin + context + 1]) for begin in range(0, 8 * L, context)]
        assert chunked[context] == pytest.approx(torch.cat(pieces, 1).mean(1).tolist(), rel=1e-5)


def documents(*sizes: int) -> list[Document]:
    return [
        Document(f"d{i}", np.arange(sum(sizes[:i]), sum(sizes[: i + 1]), dtype=np.uint16))
        for i, size in enumerate(sizes)
    ]


def test_windows_come_from_as_many_documents_as_there_are_and_never_overlap() -> None:
    given = documents(30, 9, 10, 25)
    windows, names = choose_windows(given, 10, 100)
    assert names == ["d0", "d2", "d3", "d0", "d3", "d0"]  # each once, before any a second time; d1 is too short
    tokens = windows.flatten().tolist()
    assert len(tokens) == len(set(tokens)) == 60
    for name, window in zip(names, windows, strict=True):
        (source,) = [document for document in given if document.name == name]
        start = source.tokens.tolist().index(int(window[0]))
        assert window.tolist() == source.tokens[start : start + 10].tolist()
        skipped = len(source.tokens) % 10
        assert start % 10 == skipped // 2  # the same at both ends
    fewer, their_names = choose_windows(given, 10, 4)
    assert torch.equal(fewer, windows[:4])
    assert their_names == names[:4]


def test_windows_longer_than_any_document_are_refused() -> None:
    with pytest.raises(
        UserError, match="no held-out document has the 31 tokens that a window takes, the longest has 30"
    ):
        choose_windows(documents(30, 9), 31, 4)


# --- whole measurements ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xpos and rotary, seeds 1 and 2, in runs/."""
    return train_runs(tmp_path_factory.mktemp("trained"), ("xpos", 1), ("xpos", 2), ("rotary", 1), ("rotary", 2))


def measured(trained: Path, output: Path, *names: str, **changes: Any) -> dict[str, Any]:
    extrapolate(
        [str(trained / name) for name in names or ("xpos", "rotary")],
        **{"output": str(output), "longest": 4, "windows": 6, "device": "cpu"} | changes,
    )
    return json.loads((output / "results.json").read_text())


def test_a_measurement_prints_a_table_and_writes_json_markdown_and_plots(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = measured(trained, tmp_path / "out")
    printed = capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(results["cells"]) == 2 * 2 * 6
    for mode in all_modes(16).values():
        for encoding in ("xPos", "RoPE"):
            row = f"| {encoding}, {mode.label} "
            assert (row in printed) == (mode.name in STANDARD_MODES)
            # nats, difference, perplexity, bits; and the paper's own table
            assert report.count(row) == (mode.name in STANDARD_MODES) * 4 + (mode.name in ("dense", "BCA"))
    assert "| context " in printed
    assert "| L/4 " in printed
    assert "| 4 L " in printed
    assert len(summary["thresholds"]) == 7
    for verdict in summary["thresholds"]:
        assert verdict in printed
        assert f"- {verdict}" in report
    for plot in ("extrapolation.png", "by_position.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"]({plot})" in report
    assert str(tmp_path / "out" / "extrapolation.png") in printed.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.draft"))


def test_several_seeds_are_averaged(trained: Path, tmp_path: Path) -> None:
    results = measured(trained, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for entry in summary["cells"]:
        same = [c for c in results["cells"] if (c["encoding"], c["mode"]) == (entry["encoding"], entry["mode"])]
        losses = [loss for cell in same for loss in cell["losses"][str(entry["context"])]]
        assert [cell["seed"] for cell in same] == [1, 2]
        assert len(losses) == 2 * 6
        assert entry["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)
    assert "seeds 1, 2;" in summary["caption"]


def test_the_same_runs_are_found_whichever_folder_is_given(trained: Path, tmp_path: Path) -> None:
    results = [
        measured(trained, tmp_path / "a", "xpos", "rotary"),
        measured(trained, tmp_path / "b", "xpos/seed1", "xpos", "xpos/seed2", "rotary", "rotary/seed1"),
    ]
    assert results[0] == results[1]
    everything = measured(trained, tmp_path / "c", ".")

    def by_run(results: dict[str, Any]) -> dict[tuple[str, str, int], Any]:
        return {(c["encoding"], c["mode"], c["seed"]): c["losses"] for c in results["cells"]}

    assert by_run(everything) == by_run(results[0])


@pytest.mark.parametrize("encoding", ["xpos", "rotary"])
def test_one_encoding_alone_is_measured_without_a_judgement_on_the_other(
    encoding: str, trained: Path, tmp_path: Path
) -> None:
    measured(trained, tmp_path / "out", encoding)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    collapse, dense, *_, fair, _ = summary["thresholds"]
    assert ("RoPE dense is not in this matrix" in collapse) == (encoding == "xpos")
    assert ("xPos dense is not in this matrix" in dense) == (encoding == "rotary")
    assert "BCA is not in this matrix" in fair


def test_a_measurement_up_to_the_trained_length_claims_nothing_about_longer_ones(trained: Path, tmp_path: Path) -> None:
    measured(trained, tmp_path / "out", longest=1)
    thresholds = json.loads((tmp_path / "out" / "summary.json").read_text())["thresholds"]
    assert {verdict.split(": ")[0] for verdict in thresholds} == {"not measured"}


@pytest.mark.parametrize("done", [1, 15])
def test_an_interrupted_measurement_goes_on_where_it_was_and_ends_the_same(
    done: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(trained, tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls_of_measure(patch, train.extrapolate, last=done)
        with pytest.raises(InterruptionError):
            measured(trained, tmp_path / "out")
    calls = calls_of_measure(monkeypatch, train.extrapolate)
    measured(trained, tmp_path / "out")
    assert len(calls) == 24 - done
    for name in ("results.json", "summary.json", "report.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    measured(trained, tmp_path / "out")
    assert len(calls) == 24 - done


def test_an_interruption_at_the_keyboard_is_told_in_one_line(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.extrapolate, "measure", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([str(trained), "--longest=4", "--output", str(tmp_path / "out")])
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted: the same command goes on where it was"
    assert not (tmp_path / "out").exists()


def test_a_run_that_joins_later_is_all_that_is_measured(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(trained, tmp_path / "out", "xpos")
    calls = calls_of_measure(monkeypatch, train.extrapolate)
    measured(trained, tmp_path / "out", "xpos", "rotary/seed1")
    assert calls == list(STANDARD_MODES)


def test_a_run_that_was_trained_anew_is_measured_anew(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = fit(tmp_path, "xpos", data__paths=f"[{trained.parent / 'corpus'}]", trainer__max_steps=2)
    first = measured(extra.parent, tmp_path / "out", "seed1")
    checkpoint = extra / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["transformer.embedding.weight"] *= 2
    torch.save(content, checkpoint)
    calls = calls_of_measure(monkeypatch, train.extrapolate)
    second = measured(extra.parent, tmp_path / "out", "seed1")
    assert len(calls) == 6
    assert second["cells"][:6] == first["cells"]
    assert second["cells"][3]["losses"] != first["cells"][0]["losses"]


# --- bad input -------------------------------------------------------------------------------------------------------


complaint = partial(complaint_of, main)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        *WRONG_ARGUMENTS,
        (["{runs}", "--longest", "far"], "Expected a <class 'int'>. Got value: far"),
        (["{runs}", "--longest", "3"], "longest must be a power of two, got 3"),
        (["{runs}", "--longest", "0"], "longest must be a power of two, got 0"),
        (["{runs}", "--longest", "1.5"], "Expected a <class 'int'>. Got value: 1.5"),
        (["{runs}", "--windows", "0"], "windows must be above 0, got 0"),
        (["{runs}", "--tail", "-1"], "tail must be 0 or above and finite, got -1"),
        (["{runs}", "--modes", "[dense, loose]"], "YaRN, got loose"),
        (["{runs}", "--modes", "[]"], "modes must name one at least, got none"),
        (["{runs}/xpos", "--modes", "[NTK]"], "modes: NTK fit none of the runs"),
        (["{runs}", "--temperature", "warm"], "Expected a <class 'float'>. Got value: warm"),
        (["{runs}", "--windws", "3"], "unrecognized arguments: --windws 3; did you mean windows?"),
        (
            ["{runs}", "--longest", "256"],
            "no held-out document has the 4097 tokens that a window takes, the longest has",
        ),
        (["{tmp}/empty"], "empty'; `python -m train fit` writes one"),
        (["{tmp}/begun"], "begun'; `python -m train fit` writes one"),
        (["{runs}/xpos", "{tmp}/begun"], "runs: there is no checkpoint in '"),
        (["{runs}/xpos/seed1/config.yaml"], "runs: there is no folder '"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line_and_leaves_nothing(
    args: list[str], message: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("seed_everything: 1")  # a run before its first checkpoint
    output = tmp_path / "out"
    given = [arg.format(runs=trained, tmp=tmp_path) for arg in args]
    assert message in complaint([*given, "--output", str(output)], capfd)
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_there_is_not_is_told_in_one_line(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        complaint([str(trained), "--device", "cuda"], capfd)
        == "device is cuda, and there is none here; give auto or cpu"
    )


def changed_run(trained: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    return copy_of_run(trained / "xpos" / "seed1", tmp_path / "copy", change)


WRONG_RUNS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other data": (
        lambda content: content["datamodule_hyper_parameters"].update(val_fraction=0.2),
        "differ in data or context length, so they have no common targets: ",
    ),
    "another context length": (
        lambda content: content["datamodule_hyper_parameters"].update(context_length=32),
        "differ in data or context length, so they have no common targets: ",
    ),
    "a run that was interrupted": (
        lambda content: content.update(global_step=1),
        "seed1 has 2 steps and ",
    ),
    "another program's": (lambda content: content.pop("hyper_parameters"), "is no checkpoint of this trainer"),
    "another width": (
        lambda content: content["hyper_parameters"].update(embed_dim=32),
        "seed1 (embed_dim: 16 there, 32 here)",
    ),
    "another learning rate": (
        lambda content: content["hyper_parameters"].update(learning_rate=0.1),
        "seed1 (learning_rate: 0.002 there, 0.1 here)",
    ),
    "another batch size": (
        lambda content: content["datamodule_hyper_parameters"].update(batch_size=3),
        "seed1 (batch_size: 2 there, 3 here)",
    ),
    "another decay": (
        lambda content: content["hyper_parameters"].update(scale_base=3),
        "is no seed of the model in ",
    ),
    "another frequency": (
        lambda content: content["hyper_parameters"]["positions"]["init_args"].update(base=500.0),
        "(positions.init_args.base: 500.0 there, 10000.0 here)",
    ),
    "a seed that is there twice": (lambda content: None, "seed1 are both seed 1 of xPos"),
}


@pytest.mark.parametrize("encoding", ["xpos", "rotary"])
def test_encodings_may_differ_in_their_decay_alone(
    encoding: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of_run(
        trained / "xpos" / "seed1", tmp_path / "copy", lambda content: content["hyper_parameters"].update(scale_base=3)
    )
    assert {run.encoding for run in find_runs([str(copy), str(trained / "rotary")])} == {"xPos", "RoPE"}
    narrow = copy_of_run(
        trained / "xpos" / "seed1", tmp_path / "narrow", lambda content: content["hyper_parameters"].update(num_heads=1)
    )
    assert "num_heads" in complaint([str(narrow), str(trained / encoding)], capfd)


def test_a_run_that_is_given_by_two_paths_counts_once(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(trained / "xpos")
    folders = [trained / "xpos", tmp_path / "link", trained / "rotary" / ".." / "xpos" / "seed1"]
    assert [run.seed for run in find_runs(list(map(str, folders)))] == [1, 2]


def test_a_checkpoint_that_does_not_fit_itself_is_told_in_one_line(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of_run(
        trained / "xpos" / "seed1", tmp_path / "copy", lambda content: content["hyper_parameters"].update(embed_dim=32)
    )
    assert "does not hold the weights of its own model: " in complaint([str(copy), "--longest=4"], capfd)


@pytest.mark.parametrize(("change", "message"), WRONG_RUNS.values(), ids=WRONG_RUNS.keys())
def test_runs_that_cannot_be_compared_are_told_in_one_line(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    copy = changed_run(trained, tmp_path, change)
    output = tmp_path / "out"
    assert message in complaint([str(copy), str(trained / "xpos"), "--longest=4", "--output", str(output)], capfd)
    assert not (tmp_path / "out").exists()


def test_a_context_length_that_has_no_quarter_is_refused(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of_run(
        trained / "xpos" / "seed1",
        tmp_path / "copy",
        lambda c: c["datamodule_hyper_parameters"].update(context_length=18),
    )
    assert complaint([str(copy)], capfd) == "runs: the context length must be a multiple of 4, got 18"


@pytest.mark.parametrize("content", [b"", b"weights", b"half"])
def test_a_damaged_checkpoint_is_told_in_one_line(
    content: bytes, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = changed_run(trained, tmp_path, lambda content: None) / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    assert f"{path} is no checkpoint, or a damaged one" in complaint([str(tmp_path)], capfd)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"longest": 2}, "longest 4 there, 2 here"),
        ({"windows": 5}, "windows 6 there, 5 here"),
        ({"temperature": 0.5}, "temperature 0.2 there, 0.5 here"),
    ],
)
def test_results_with_other_settings_are_left_alone(
    changes: dict[str, Any], message: str, trained: Path, tmp_path: Path
) -> None:
    measured(trained, tmp_path / "out", "xpos/seed1")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=rf"{message}.*give another --output, or remove it"):
        measured(trained, tmp_path / "out", "xpos/seed1", **changes)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_results_of_other_text_are_left_alone(tmp_path: Path) -> None:
    run = fit(tmp_path, trainer__max_steps=2)
    measured(run.parent, tmp_path / "out", "seed1")
    (tmp_path / "corpus" / "1.txt").write_text("of the test files, one that was changed since. " * 20)
    with pytest.raises(UserError, match="text_sha256 "):
        measured(run.parent, tmp_path / "out", "seed1")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"settings": 1, "cells": []}', '{"settings": {}, "cells": [1]}']
)
def test_damaged_results_are_told_in_one_line(
    content: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    line = complaint([str(trained), "--longest=4", "--output", str(tmp_path)], capfd)
    assert line == f"output: {path} holds no results, or damaged ones; give another --output, or remove it"
    assert path.read_text() == content


def test_text_that_has_gone_since_the_training_is_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, trainer__max_steps=2)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    corpus = tmp_path / "corpus"
    assert complaint([str(run)], capfd) == f"data.paths: there is no file or folder '{corpus}'"
    write_corpus(corpus, files=1)
    assert "none of the 1 documents with text fell to the test split" in complaint([str(run)], capfd)
