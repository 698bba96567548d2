"""Associative recall: what a window holds, that its data hangs on the step alone, and what the accuracy is of."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    CONFIGS,
    STEPS,
    WRONG_ARGUMENTS,
    InterruptionError,
    Recorder,
    calls_of_measure,
    complaint_of,
    copy_of_run,
    options,
    read_checkpoint,
    train_runs,
    write_corpus,
)
from tiny import fit as fit_text
from torch import Tensor

import train.retrieval_accuracy
from train.errors import UserError
from train.language_model import IGNORED, LanguageModel
from train.retrieval import (
    ANSWERS,
    BINDINGS,
    FILLERS,
    KEYS,
    QUESTIONS,
    VALUES,
    RecallData,
    RecallWindows,
    Window,
    main,
    recall_window,
)
from train.retrieval_accuracy import RECALL, Questions, Settings, ask, count_right, retrieval_accuracy
from train.retrieval_accuracy import main as accuracy_main
from train.retrieval_report import CHANCE, Recalled, statements, wilson
from train.runs import find_runs

L = 16
SETTINGS = Settings(L, couples=2, steps=2, longest=4, samples=24, seed=1, temperature=0.3, tail=2.0)
SHIPPED = ("xpos", "rotary")


def recall_options(tmp_path: Path, config: str = "xpos", **changes: Any) -> list[str]:
    """A shipped configuration of this task, made small."""
    ours: dict[str, Any] = {"data__paths": None, "data__cache": None, "data__max_val_windows": None}
    ours |= {"data__val_windows": 4, "data__couples": 2}
    return options(tmp_path, f"retrieval/{config}", **(ours | changes))


def fit(tmp_path: Path, config: str = "xpos", more: tuple[str, ...] = (), **changes: Any) -> Path:
    """Train; gives the run's folder."""
    main(["fit", *recall_options(tmp_path, config, **changes), *more])
    return tmp_path / "runs" / str(changes.get("name", config)) / f"seed{changes.get('seed_everything', 1)}"


def key_of(token: int) -> int | None:
    """The key of a binding or question."""
    if token in BINDINGS:
        return (token - BINDINGS.start) // VALUES
    return token - QUESTIONS.start if token in QUESTIONS else None


def windows(count: int, length: int = 64, couples: int = 8, longest: int = 64, **more: Any) -> list[Window]:
    return [recall_window(np.random.default_rng((9, i)), length, couples, longest, **more) for i in range(count)]


def same_batches(ours: list[Any], theirs: list[Any]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


# --- a window --------------------------------------------------------------------------------------------------------


def test_the_alphabets_share_no_token_and_use_all() -> None:
    assert sorted([*FILLERS, *QUESTIONS, *ANSWERS, *BINDINGS]) == list(range(256))
    assert (len(QUESTIONS), len(ANSWERS), len(BINDINGS)) == (KEYS, VALUES, KEYS * VALUES)


@pytest.mark.parametrize(("length", "couples", "longest"), [(64, 8, 64), (8, 1, 8), (16, 4, 16), (128, 11, 100)])
def test_every_key_is_bound_once_and_then_asked_once_and_all_else_is_filler(
    length: int, couples: int, longest: int
) -> None:
    for window in windows(100, length, couples, longest):
        tokens = window.tokens.tolist()
        keys = [key_of(token) for token in tokens]
        taken = []
        for binding, question, answer in zip(window.bindings, window.questions, window.answers, strict=True):
            assert 1 <= question - binding < longest
            assert tokens[binding] in BINDINGS
            assert tokens[question] in QUESTIONS
            assert keys[binding] == keys[question]
            assert keys.count(keys[binding]) == 2
            assert answer in ANSWERS
            assert (tokens[binding] - BINDINGS.start) % VALUES == answer - ANSWERS.start
            taken += [binding, question]
        assert len(set(taken)) == len(taken) > 0
        assert all(token in FILLERS for at, token in enumerate(tokens) if at not in taken)


def test_distances_are_all_that_fit_and_log_uniform() -> None:
    distances = np.concatenate([window.questions - window.bindings + 1 for window in windows(4000)])
    assert set(distances.tolist()) == set(range(2, 65))
    assert len(distances) > 0.99 * 4000 * 8  # nearly all couples find room
    octaves = Counter(int(math.log2(distance)) for distance in distances if distance < 64)
    share = math.log(2) / math.log(65 / 2)
    for octave in range(1, 6):  # five standard deviations, and a hundredth for the couples without room
        assert octaves[octave] / len(distances) == pytest.approx(share, abs=5 * (0.16 / len(distances)) ** 0.5 + 0.01)


def test_values_are_uniform() -> None:
    counts = Counter(np.concatenate([window.answers for window in windows(1000)]).tolist())
    total = sum(counts.values())
    for answer in ANSWERS:
        assert counts[answer] / total == pytest.approx(1 / VALUES, abs=5 * (0.08 / total) ** 0.5)


def test_the_key_that_is_posed_is_nowhere_else_and_others_recur_as_late_as_they_can() -> None:
    for window in windows(20, 1500, 180, 64, posed=(100, 1400)):
        keys = [key_of(token) for token in window.tokens.tolist()]
        assert (window.bindings[0], window.questions[0]) == (100, 1400)
        assert [at for at, key in enumerate(keys) if key == keys[100]] == [100, 1400]
        others = [keys[at] for at in sorted(window.bindings[1:])]
        assert len(others) > 150
        assert set(others) == set(range(KEYS)) - {keys[100]}
        assert others[: KEYS - 1] * (len(others) // KEYS) == others[: (KEYS - 1) * (len(others) // KEYS)]


def test_the_targets_are_the_answers_to_questions_and_no_others() -> None:
    dataset = RecallWindows(64, 8, "train", 100)
    asked = 0
    for i in range(len(dataset)):
        inputs, targets = (part.tolist() for part in dataset[i])
        assert len(inputs) == len(targets) == 64
        bound: dict[int | None, int] = {}
        for token, target in zip(inputs, targets, strict=True):
            assert target == (bound[key_of(token)] if token in QUESTIONS else IGNORED)
            if token in BINDINGS:
                bound[key_of(token)] = ANSWERS.start + (token - BINDINGS.start) % VALUES
            asked += target != IGNORED
    assert asked > 0.99 * 8 * len(dataset)


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_window_hangs_on_its_split_and_number_alone() -> None:
    one, other = RecallWindows(64, 8, "train", 100), RecallWindows(64, 8, "train", 2**32)
    forwards = [one[i][0] for i in range(10)]
    assert same_batches([forwards], [[other[i][0] for i in reversed(range(10))][::-1]])
    different = {tuple(tokens.tolist()) for tokens in forwards}
    different |= {tuple(RecallWindows(64, 8, split, 10)[i][0].tolist()) for split in ("val", "test") for i in range(10)}
    assert len(different) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 7}, "data.context_length must be 8 or above, got 7"),
        ({"batch_size": 0}, "data.batch_size must be 1 or above, got 0"),
        ({"couples": 0}, "data.couples must be 1 or above, got 0"),
        ({"couples": 12}, "data.couples must be at most 11 with context_length 64, got 12"),
        ({"context_length": 16}, "data.couples must be at most 4 with context_length 16, got 8"),
        ({"val_windows": 0}, "data.val_windows must be 1 or above, got 0"),
        ({"num_workers": -1}, "data.num_workers must be 0 or above, got -1"),
    ],
)
def test_a_size_out_of_range_is_named_as_the_configuration_names_it(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RecallData(**({"context_length": 64} | changes))


def test_targets_that_are_ignored_do_not_count() -> None:
    torch.manual_seed(0)
    module = LanguageModel(L, embed_dim=16, num_layers=1, num_heads=2).double()
    inputs, everything = torch.randint(256, (2, 3, L))
    some = everything.masked_fill(torch.rand(3, L) < 0.7, IGNORED)
    by_hand = -module(inputs).log_softmax(-1).gather(2, everything[..., None])[..., 0][some != IGNORED].mean()
    torch.testing.assert_close(module.loss((inputs, some)), by_hand)
    windows = torch.cat((inputs, everything[:, -1:]), 1)
    assert torch.equal(module.loss(windows), module.loss((inputs, windows[:, 1:])))


# --- training --------------------------------------------------------------------------------------------------------


def test_the_two_encodings_differ_in_one_word() -> None:
    ours, theirs = ((CONFIGS / "retrieval" / f"{config}.yaml").read_text().split() for config in SHIPPED)
    assert [pair for pair in zip(ours, theirs, strict=True) if len(set(pair)) > 1] == [("XPOS", "RotaryEmbedding")]
    assert {path.stem for path in (CONFIGS / "retrieval").iterdir()} == {*SHIPPED, "data", "trainer"}


@pytest.mark.parametrize("config", SHIPPED)
def test_every_configuration_trains_validates_and_tests(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = {f"trainer__callbacks{part}": None for part in ("", "__save_last", "__save_top_k")}
    as_shipped: dict[str, Any] = callbacks | {"trainer__callbacks__every_n_train_steps": None}
    assert read_checkpoint(fit(tmp_path, config, **as_shipped))["global_step"] == STEPS
    for command, split in (("validate", "val"), ("test", "test")):
        capsys.readouterr()
        main([command, *recall_options(tmp_path, config, **as_shipped)])
        shown = re.search(rf"{split}_accuracy\W+([\d.]+)", capsys.readouterr().out)
        assert shown is not None
        assert 0 <= float(shown[1]) <= 1


def test_runs_go_into_a_folder_of_their_own() -> None:
    assert all("\nruns: runs/retrieval\n" in (CONFIGS / "retrieval" / f"{c}.yaml").read_text() for c in SHIPPED)


RECORD = ("--trainer.callbacks+=tiny.Recorder",)


def test_both_encodings_are_trained_on_the_same_batches_and_another_seed_on_others(tmp_path: Path) -> None:
    batches = []
    for config, seed in (("xpos", 1), ("rotary", 1), ("xpos", 2)):
        fit(tmp_path, config, more=RECORD, seed_everything=seed)
        batches.append(Recorder.batches)
    assert len(batches[0]) == STEPS
    assert same_batches(batches[0], batches[1])
    assert not any(same_batches([ours], [theirs]) for ours, theirs in zip(batches[0], batches[2], strict=True))


def test_a_resumed_run_draws_the_batches_that_it_would_have_drawn_and_ends_the_same(tmp_path: Path) -> None:
    whole = fit(tmp_path, name="whole", more=RECORD)
    drawn = Recorder.batches
    interrupt = '--trainer.callbacks+={"class_path": "tiny.Interrupt", "init_args": {"step": 4}}'
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=(interrupt,))
    resumed = fit(tmp_path, more=RECORD)  # from the checkpoint at step 3
    assert same_batches(Recorder.batches, drawn[3:])
    ours, theirs = (read_checkpoint(run)["state_dict"] for run in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- the measure -----------------------------------------------------------------------------------------------------


def logits_of(tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens, 256).float()


def knows(tokens: Tensor) -> Tensor:
    """The answer to each question that is bound in its window; elsewhere, and where it is not, no answer at all."""
    found = torch.zeros_like(tokens)
    for row, window in enumerate(tokens.tolist()):
        bound: dict[int | None, int] = {}
        for at, token in enumerate(window):
            if token in BINDINGS:
                bound[key_of(token)] = ANSWERS.start + (token - BINDINGS.start) % VALUES
            elif token in QUESTIONS:
                found[row, at] = bound.get(key_of(token), 0)
    return logits_of(found)


@pytest.mark.parametrize("distance", SETTINGS.distances)
def test_a_question_stands_at_its_distance_and_every_phase_of_a_block_is_asked_equally(distance: int) -> None:
    asked = ask(distance, 1, SETTINGS)
    assert asked.windows.shape[1] == distance + L // 2 - 1
    phases = Counter((asked.at % (L // 2)).tolist())
    assert phases == dict.fromkeys(range(L // 2), SETTINGS.samples // (L // 2))
    bindings = []
    for window, at, answer in zip(asked.windows.tolist(), asked.at.tolist(), asked.answers.tolist(), strict=True):
        keys = [key_of(token) for token in window]
        assert window[at] in QUESTIONS
        assert [place for place, key in enumerate(keys) if key == keys[at]] == [at - distance + 1, at]
        assert (window[at - distance + 1] - BINDINGS.start) % VALUES == answer - ANSWERS.start
        bindings.append(sum(token in BINDINGS for token in window))
    density = SETTINGS.couples / L  # as in training
    assert np.mean(bindings) == pytest.approx(max(2, density * asked.windows.shape[1]), abs=0.6)


def test_questions_are_the_same_in_every_call_and_others_for_another_seed() -> None:
    first, again, other, third = (
        ask(L, run, Settings(L, 2, 2, 4, 24, seed, 0.3, 2.0)) for run, seed in ((1, 1), (1, 1), (2, 1), (1, 2))
    )
    assert torch.equal(first.windows, again.windows)
    assert torch.equal(first.answers, again.answers)
    assert not torch.equal(first.windows, other.windows)
    assert not torch.equal(first.windows, third.windows)


@pytest.mark.parametrize("distance", SETTINGS.distances)
def test_a_model_that_knows_the_answer_scores_all(distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for at_once in (1, 100, 8192):
        monkeypatch.setattr(train.retrieval_accuracy, "TOKENS_AT_ONCE", at_once)
        assert count_right(knows, ask(distance, 1, SETTINGS)) == SETTINGS.samples


@pytest.mark.parametrize("distance", SETTINGS.distances)
def test_the_last_tokens_alone_hide_bindings_that_are_farther_and_no_others(distance: int) -> None:
    asked = ask(distance, 1, SETTINGS)
    last = asked.last(L)
    assert last.windows.shape[1] <= L
    for i in range(len(asked)):
        at, kept = int(asked.at[i]), int(last.at[i])
        seen = last.windows[i, : kept + 1]
        assert torch.equal(seen, asked.windows[i, max(0, at + 1 - L) : at + 1])
    assert count_right(knows, last) == (SETTINGS.samples if distance <= L else 0)


def test_a_model_that_guesses_among_the_values_scores_chance() -> None:
    generator = torch.Generator().manual_seed(1)

    def guesses(tokens: Tensor) -> Tensor:
        return logits_of(torch.randint(ANSWERS.start, ANSWERS.stop, tokens.shape, generator=generator))

    many = Settings(L, 2, 2, 1, 3000, 1, 0.3, 2.0)
    low, high = wilson(count_right(guesses, ask(L, 1, many)), many.samples, confidence=0.999)
    assert low < CHANCE == 1 / 12 < high


@pytest.mark.parametrize("mode", [mode.name for mode in SETTINGS.modes()])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_bound_on_what_a_mode_reaches_is_exact(mode: str, layers: int) -> None:
    (chosen,) = [m for m in SETTINGS.modes() if m.name == mode]
    torch.manual_seed(0)
    model = LanguageModel(L, embed_dim=16, num_layers=layers, num_heads=2).transformer.double().eval()
    for parameter in model.parameters():
        parameter.data *= 5  # so that what is far shows
    chosen.set_on(model)
    bound = chosen.reach(layers, L)
    at = 6 * L - 1  # the end of a block

    def answer(tokens: Tensor) -> Tensor:
        window = tokens[None, : at + 1]
        if chosen.recompute:
            window = Questions(window, torch.tensor([at]), torch.tensor([0])).last(L).windows
        return model(window)[0, -1]

    tokens = torch.randint(256, (at + 1,))
    with torch.no_grad():
        farthest = 0 if bound is None else at - bound + 1
        for place, seen in ((farthest, True), *([] if bound is None else [(farthest - 1, False)])):
            changed = tokens.clone()
            changed[place] = (changed[place] + 1) % 256
            assert torch.equal(answer(changed), answer(tokens)) != seen


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (1 - 0.1611, 1.0)),
    ],
)
def test_wilson_intervals_are_the_published_ones(right: int, count: int, expected: tuple[float, float]) -> None:
    assert wilson(right, count) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("count", [1, 8, 200, 400])
def test_a_wilson_interval_holds_its_share_and_no_less_than_0_or_more_than_1(count: int) -> None:
    for right in range(count + 1):
        low, high = wilson(right, count)
        assert 0 <= low <= right / count <= high <= 1


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both encodings and, of xPos, of a second seed."""
    return train_runs(tmp_path_factory.mktemp("trained"), ("xpos", 1), ("xpos", 2), ("rotary", 1), train=fit)


def measured(trained: Path, output: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"longest": 4, "samples": 8} | changes
    retrieval_accuracy([str(trained)], str(output), **given)
    return json.loads((output / "results.json").read_text())


def test_the_report_says_what_was_measured(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = measured(trained, tmp_path / "out")
    modes, shown = [mode.name for mode in SETTINGS.modes()], capsys.readouterr().out
    assert [(c["mode"], c["encoding"], c["seed"]) for c in results["cells"]] == [
        (mode, *run) for mode in modes for run in (("RoPE", 1), ("xPos", 1), ("xPos", 2))
    ]
    report = (tmp_path / "out" / "report.md").read_text()
    heads = re.findall(r"^\| distance +\| (.*) \|$", report, re.MULTILINE)
    assert {tuple(head.replace(" ", "").split("|")) for head in heads} == {("L/4", "L/2", "L", "2L", "4L")}
    for mode in SETTINGS.modes():
        for encoding in ("xPos", "RoPE"):
            cells = [c for c in results["cells"] if (c["mode"], c["encoding"]) == (mode.name, encoding)]
            label = cells[0]["label"]
            rows = re.findall(rf"^\| {re.escape(f'{encoding}, {label}')} +\| (.*) \|$", report, re.MULTILINE)
            shares = [sum(cell["right"][str(d)] for cell in cells) / (8 * len(cells)) for d in SETTINGS.distances]
            assert [entry.strip() for entry in rows[0].split("|")] == [f"{100 * share:.1f}" for share in shares]
            assert len(rows) == 3  # accuracy, intervals, seeds
            assert rows[0] in shown
    assert "seeds 1, 2, 8 questions a distance and seed; chance is 8.3 %" in report
    blockwise = re.findall(r"^- .*BCA.*: up to L .*; out of reach, beyond 1 L ", report, re.MULTILINE)
    assert len(blockwise) == 2  # the model has one layer
    assert (tmp_path / "out" / "retrieval.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_chance_beyond_reach_is_called_that() -> None:
    settings = Settings(L, 2, 2, 4, 100, 1, 0.3, 2.0)
    cell = {"encoding": "xPos", "mode": "BCA", "label": "BCA", "seed": 1}
    for far, verdict in ((8, "which is chance"), (30, "which is NOT chance")):
        right = {d: 100 if d <= L else far for d in settings.distances}
        (told,) = statements([Recalled([cell | {"right": right}], 100)], {"BCA": 40}, settings)
        assert told.startswith("xPos, BCA: up to L 100.0 % [98.7 to 100.0]; beyond L ")
        assert "; out of reach, beyond 2.5 L " in told
        assert told.endswith(verdict)


def test_an_interrupted_measurement_goes_on_where_it_was_and_ends_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(trained, tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls_of_measure(patch, train.retrieval_accuracy, last=4)
        with pytest.raises(InterruptionError):
            measured(trained, tmp_path / "out")
    calls = calls_of_measure(monkeypatch, train.retrieval_accuracy)
    measured(trained, tmp_path / "out")
    assert len(calls) == 3 * len(SETTINGS.modes()) - 4
    for name in ("results.json", "report.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    measured(trained, tmp_path / "out")
    assert len(calls) == 3 * len(SETTINGS.modes()) - 4
    with pytest.raises(UserError, match="samples 8 there, 9 here"):
        measured(trained, tmp_path / "out", samples=9)


complaint = partial(complaint_of, accuracy_main)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        *WRONG_ARGUMENTS,
        (["{runs}", "--longest", "3"], "longest must be a power of two, got 3"),
        (["{runs}", "--samples", "0"], "samples must be above 0, got 0"),
        (["{runs}", "--seed", "-1"], "seed must be 0 or above, got -1"),
        (["{runs}", "--smaples", "3"], "did you mean samples?"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line_and_leaves_nothing(
    args: list[str], message: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert message in complaint([*(arg.format(runs=trained) for arg in args), "--output", str(output)], capfd)
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["datamodule_hyper_parameters"].update(couples=1), "couples"),
        (lambda content: content.update(global_step=1), "steps"),
        (lambda content: content["hyper_parameters"].update(learning_rate=0.1), "learning_rate"),
        (lambda content: content["hyper_parameters"].update(scale_base=3), "scale_base"),
        (lambda content: None, "are both seed 1 of xPos"),
    ],
)
def test_runs_that_cannot_be_compared_are_told_in_one_line(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    copy = copy_of_run(trained / "xpos" / "seed1", tmp_path / "copy", change)
    assert message in complaint([str(copy), str(trained / "xpos"), "--output", str(tmp_path / "out")], capfd)
    assert not (tmp_path / "out").exists()


def test_a_run_on_text_is_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus")
    run = fit_text(tmp_path, trainer__max_steps=1)
    assert "has no data.couples: it is no run of `python -m train.retrieval fit`" in complaint([str(run)], capfd)


def test_encodings_that_are_given_twice_count_once(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(trained / "xpos")
    assert [run.seed for run in find_runs([str(trained / "xpos"), str(tmp_path / "link")], RECALL)] == [1, 2]
