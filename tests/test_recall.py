"""Associative recall: what a window holds, that its data hangs on its number alone, and what the accuracy is of."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONFIGS, read_checkpoint
from torch import Tensor

import study.recall
from study.recall import (
    ANSWERS,
    BINDINGS,
    FILLERS,
    KEYS,
    QUESTIONS,
    VALUES,
    RecallData,
    RecallWindows,
    Window,
    ask,
    count_right,
    main,
    measure_recall,
    recall_window,
    wilson,
)
from train.errors import UserError
from train.language_model import IGNORED
from train.modes import standard_modes
from train.runs import find_runs

L = 16
DISTANCES = [4, 8, 16, 32, 64]
SAMPLES, COUPLES = 24, 2


def key_of(token: int) -> int | None:
    """The key of a binding or question."""
    if token in BINDINGS:
        return (token - BINDINGS.start) // VALUES
    return token - QUESTIONS.start if token in QUESTIONS else None


def windows(count: int, length: int = 64, couples: int = 8, longest: int = 64, **more: Any) -> list[Window]:
    return [recall_window(np.random.default_rng((9, i)), length, couples, longest, **more) for i in range(count)]


@pytest.mark.parametrize(
    ("length", "couples", "longest", "looks"),
    [(64, 8, 64, 1), (8, 1, 8, 1), (128, 11, 100, 1), (64, 8, 64, 2), (8, 2, 8, 2)],
)
def test_every_key_is_bound_once_and_then_asked_once_and_all_else_is_filler(length, couples, longest, looks):
    for window in windows(100, length, couples, longest, looks=looks):
        tokens = window.tokens.tolist()
        keys = [key_of(token) for token in tokens]
        taken = [*window.bindings, *window.questions, *(window.bindings - 1 if looks == 2 else [])]
        for binding, question, answer in zip(window.bindings, window.questions, window.answers, strict=True):
            assert 1 <= question - binding < longest
            first = binding + 1 - looks
            assert tokens[question] in QUESTIONS
            assert [at for at, key in enumerate(keys) if key == keys[question]] == [first, question]
            if looks == 1:
                assert (tokens[binding] - BINDINGS.start) % VALUES == answer - ANSWERS.start
            else:
                assert (tokens[first], tokens[binding]) == (tokens[question], answer)
        assert len(set(taken)) == len(taken)
        assert taken or looks == 2  # where a question as far as the window is long finds no room
        assert all(token in FILLERS for at, token in enumerate(tokens) if at not in taken)


def test_distances_are_all_that_fit_and_log_uniform_and_values_uniform():
    many = windows(4000)
    distances = np.concatenate([window.questions - window.bindings + 1 for window in many])
    assert set(distances.tolist()) == set(range(2, 65))
    assert len(distances) > 0.99 * 4000 * 8  # nearly all couples find room
    octaves = Counter(int(math.log2(distance)) for distance in distances if distance < 64)
    share = math.log(2) / math.log(65 / 2)
    for octave in range(1, 6):  # five standard deviations, and a hundredth for the couples without room
        assert octaves[octave] / len(distances) == pytest.approx(share, abs=5 * (0.16 / len(distances)) ** 0.5 + 0.01)
    answers = Counter(np.concatenate([window.answers for window in many]).tolist())
    for answer in ANSWERS:
        assert answers[answer] / len(distances) == pytest.approx(1 / VALUES, abs=5 * (0.08 / len(distances)) ** 0.5)


def test_targets_are_the_answers_and_a_window_hangs_on_its_split_and_number_alone():
    one, other = RecallWindows(64, 8, "train", 100), RecallWindows(64, 8, "train", 2**32)
    different = set()
    for i in reversed(range(50)):
        inputs, targets = one[i]
        assert all(map(torch.equal, one[i], other[i]))
        answered = torch.from_numpy(np.isin(inputs, QUESTIONS))
        assert torch.equal(targets != IGNORED, answered)
        assert torch.equal(targets[answered], knows(inputs[None])[0].argmax(-1)[answered])
        different |= {tuple(RecallWindows(64, 8, split, 50)[i][0].tolist()) for split in ("train", "val", "test")}
    assert len(different) == 150


def test_a_size_out_of_range_is_named_as_the_configuration_names_it():
    with pytest.raises(UserError, match=r"data\.context_length must be 8 or above, got 7"):
        RecallData(7)
    with pytest.raises(UserError, match=r"data\.couples must be at most 4 with context_length 16, got 8"):
        RecallData(16)


def knows(tokens: Tensor) -> Tensor:
    """Logits for the answer to each question that is bound in its window; elsewhere for no answer at all."""
    found = torch.zeros_like(tokens)
    for row, window in enumerate(tokens.tolist()):
        bound: dict[int | None, int] = {}
        for at, token in enumerate(window):
            if token in BINDINGS:
                bound[key_of(token)] = ANSWERS.start + (token - BINDINGS.start) % VALUES
            elif token in ANSWERS and at > 0:  # of two looks
                bound[key_of(window[at - 1])] = token
            elif token in QUESTIONS:
                found[row, at] = bound.get(key_of(token), 0)
    return torch.nn.functional.one_hot(found, 256).float()


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_question_stands_at_its_distance_and_every_phase_of_a_block_is_asked_equally(distance, looks):
    asked = ask(distance, 1, SAMPLES, COUPLES, L, looks=looks)
    assert asked.windows.shape[1] == distance + L // 2 - 2 + looks
    assert Counter((asked.at % (L // 2)).tolist()) == dict.fromkeys(range(L // 2), SAMPLES // (L // 2))
    bindings = []
    for window, at in zip(asked.windows.tolist(), asked.at.tolist(), strict=True):
        keys = [key_of(token) for token in window]
        assert [place for place, key in enumerate(keys) if key == keys[at]] == [at - distance + 2 - looks, at]
        assert len(set(keys)) <= KEYS + 1
        bindings.append(sum(token in BINDINGS or token in ANSWERS for token in window))
    assert np.mean(bindings) == pytest.approx(max(2, COUPLES / L * asked.windows.shape[1]), abs=0.6)  # as in training


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_model_that_knows_scores_all_and_with_the_last_tokens_alone_what_they_hold(distance, looks, monkeypatch):
    asked = ask(distance, 1, SAMPLES, COUPLES, L, looks=looks)
    for at_once in (1, 8192):
        monkeypatch.setattr(study.recall, "TOKENS_AT_ONCE", at_once)
        assert count_right(knows, asked) == SAMPLES
        assert count_right(knows, asked.last(L)) == (SAMPLES if distance + looks - 1 <= L else 0)


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
def test_wilson_intervals_are_the_published_ones(right, count, expected):
    assert wilson(right, count) == pytest.approx(expected, abs=5e-5)


@pytest.mark.slow
def test_a_model_is_trained_on_the_task_and_measured(tmp_path):
    sizes = {"data.context_length": L, "data.couples": COUPLES, "data.val_windows": 4, "data.batch_size": 4}
    sizes |= {"model.embed_dim": 16, "model.num_layers": 1, "trainer.max_steps": 2, "trainer.log_every_n_steps": 1}
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("recall", "xpos")]
    more = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--runs={tmp_path}"]
    main(["fit", *configs, *(f"--{name}={size}" for name, size in sizes.items()), *more])
    assert read_checkpoint(tmp_path / "xpos" / "seed1")["global_step"] == 2
    found = find_runs([tmp_path], "couples")
    right = measure_recall(found, standard_modes(L), tmp_path / "recall.json", longest=4, samples=8).tables["right"]
    assert len(right) == 6 * 5
    assert (right["asked"] == 8).all()
    assert right["right"].between(0, 8).all()
