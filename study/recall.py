"""`python -m study.recall fit --config configs/recall.yaml --config configs/xpos.yaml`: associative recall.

A window is random fillers with couples among them: a binding, which is one token for a key and a value, and further on
a question, a token for the key alone. What each question is to be followed by, the value's own token, is all that the
model learns to predict. A window holds each key in one couple only. How many tokens there are from binding to question,
both counted, is log-uniform from 2 to the context length, so that every distance in a context is trained.

That keys and values share a token makes it a matter of one look back, where a key followed by its value would take two,
one of them to the token before: a skill that a model learns late and all of a sudden, and not what is measured here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.__main__ import main as train
from train.data import RandomBatches, check_sizes
from train.errors import UserError
from train.extrapolate import TOKENS_AT_ONCE
from train.language_model import IGNORED
from train.measure import DEVICE, Results, measure, octaves
from train.modes import Mode
from train.runs import Run

VOCAB_SIZE = 256
KEYS = VALUES = 12  # how many there are
CHANCE = 1 / VALUES  # of a guess among the values
BINDINGS = range(VOCAB_SIZE - KEYS * VALUES, VOCAB_SIZE)  # tokens: of key k and value v, number k * VALUES + v
ANSWERS = range(BINDINGS.start - VALUES, BINDINGS.start)
QUESTIONS = range(ANSWERS.start - KEYS, ANSWERS.start)
FILLERS = range(QUESTIONS.start)

DISTRACTORS = ("growing", "fixed")  # the number of other couples in a window: as its length, or as in training
NUMBERS = 2**32  # of training windows: more than are ever drawn
STREAMS = {"train": 0, "val": 1, "test": 2, "measure": 3}  # whose windows have no random numbers in common


@dataclass(frozen=True)
class Window:
    """tokens (n,) and, of its couples (c,): where the binding and the question are, and the token that answers it."""

    tokens: np.ndarray
    bindings: np.ndarray
    questions: np.ndarray
    answers: np.ndarray


def recall_window(
    rng: np.random.Generator,
    length: int,
    couples: int,
    longest: int,
    asked: tuple[int, int] | None = None,
    looks: int = 1,
) -> Window:
    """A random window with up to `couples` couples, as many as find room, each within `longest` tokens.

    Args:
        rng: what it is drawn from.
        length: tokens.
        couples: how many pairs of a binding and a question to place.
        longest: the most tokens from a binding to its question, both counted; at most `length`.
        asked: where the binding and the question of one more couple are, the first of the window's. Its key is in no
            other couple; the others' keys recur where there are more couples than keys, as late as possible.
        looks: 1, or 2 where a binding is two tokens: the key's own and, where `bindings` says, its value's.
    """
    free = np.ones(length, dtype=bool)
    placed: list[tuple[int, int]] = []

    def place(binding: int, question: int) -> None:
        free[[binding + 1 - looks, binding, question]] = False
        placed.append((binding, question))

    if asked:
        place(*asked)
    spans = np.exp(rng.uniform(math.log(2), math.log(longest + 1), couples)).astype(int).clip(2, longest)
    for back in sorted((spans - 1).tolist(), reverse=True):  # far ones have the fewest places to go to
        starts = np.flatnonzero(free[looks - 1 : -back] & free[: length - back - looks + 1] & free[looks - 1 + back :])
        if len(starts):
            start = int(rng.choice(starts)) + looks - 1
            place(start, start + back)

    alphabet = rng.permutation(KEYS)
    first = [alphabet[-1]] if asked else []
    others = alphabet[:-1] if asked else alphabet
    in_turn = sorted(placed[len(first) :])
    keys = np.array([*first, *(others[i % len(others)] for i in range(len(in_turn)))], dtype=int)
    bindings, questions = np.array([*placed[: len(first)], *in_turn], dtype=int).reshape(-1, 2).T
    values = rng.integers(VALUES, size=len(keys))
    tokens = rng.choice(FILLERS, length)
    if looks == 1:
        tokens[bindings] = BINDINGS.start + keys * VALUES + values
    else:
        tokens[bindings - 1], tokens[bindings] = QUESTIONS.start + keys, ANSWERS.start + values
    tokens[questions] = QUESTIONS.start + keys
    return Window(tokens, bindings, questions, ANSWERS.start + values)


class RecallWindows(Dataset[tuple[Tensor, Tensor]]):
    """Item i is drawn from the number i alone: inputs (length,), and targets (length,), the answers to questions."""

    def __init__(self, length: int, couples: int, split: str, count: int, looks: int = 1):
        self.length, self.couples, self.split, self.count, self.looks = length, couples, split, count, looks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((STREAMS[self.split], index))
        window = recall_window(rng, self.length, self.couples, self.length, looks=self.looks)
        targets = np.full(self.length, IGNORED)
        targets[window.questions] = window.answers
        return torch.from_numpy(window.tokens), torch.from_numpy(targets)


class RecallData(L.LightningDataModule):
    """Windows of associative recall.

    Args:
        context_length: training length L in tokens; at least 8.
        batch_size: windows a step and device.
        couples: how many bindings with a question a window has, if they find room.
        looks: 1 where a binding is one token, 2 where it is two.
        val_windows: how many windows validation and test use; the same for every seed.
        num_workers: processes that make data; 0 makes it in the training process.
        seed: of the training windows; `seed_everything` sets it.

    Raises:
        UserError: a size is too small, or there are more couples than keys or room.
    """

    def __init__(
        self,
        context_length: int,
        batch_size: int = 32,
        couples: int = 8,
        looks: Literal[1, 2] = 1,
        val_windows: int = 256,
        num_workers: int = 0,
        seed: int = 1,
    ):
        super().__init__()
        check_sizes(
            ("context_length", context_length, 8),
            ("batch_size", batch_size, 1),
            ("couples", couples, 1),
            ("val_windows", val_windows, 1),
            ("num_workers", num_workers, 0),
        )
        most = min(KEYS - 1, context_length // 4)  # one key is left to ask for; half the window is left to fillers
        if couples > most:
            raise UserError(f"data.couples must be at most {most} with context_length {context_length}, got {couples}")
        self.save_hyperparameters()
        self.options: Any = self.hparams
        self.vocab_size = VOCAB_SIZE

    def train_dataloader(self) -> DataLoader:
        batches = RandomBatches.of_training(self.trainer, NUMBERS, self.options.batch_size, self.options.seed)
        return self._loader("train", NUMBERS, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val", self.options.val_windows, batch_size=self.options.batch_size)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.options.val_windows, batch_size=self.options.batch_size)

    def _loader(self, split: str, count: int, **batches: Any) -> DataLoader:
        options = self.options
        windows = RecallWindows(options.context_length, options.couples, split, count, options.looks)
        return DataLoader(windows, num_workers=options.num_workers, **batches)


# --- accuracy by distance --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Windows (w, n), where the question that is asked is in each, (w,), and the token that answers it, (w,)."""

    windows: Tensor
    at: Tensor
    answers: Tensor

    def last(self, length: int) -> "Questions":
        """The same with no more than the last `length` tokens, the question included."""
        first = (self.at + 1 - length).clamp(min=0)
        kept = first[:, None] + torch.arange(min(length, self.windows.shape[1]))
        return Questions(self.windows.gather(1, kept), self.at - first, self.answers)


def ask(
    distance: int, seed: int, samples: int, couples: int, length: int, distractors: str = "growing", looks: int = 1
) -> Questions:
    """Questions `distance` tokens from their bindings, both counted; `couples` is how many a trained `length` has.

    Before the binding are 0 to L/2 - 1 tokens, each number equally often, so that every phase of a block of L/2 counts
    the same. All else is fillers and couples of other keys, as far apart as in training: as dense as there, so that
    their number grows with the window, or a fixed number, as many as a trained length has.
    """
    most_before = length // 2 - 1
    n = most_before + distance + looks - 1
    others = max(1, round(couples * n / length) - 1) if distractors == "growing" else couples - 1
    windows, at = [], []
    for i in range(samples):
        rng = np.random.default_rng((STREAMS["measure"], 1, seed, distance, i))
        binding = i % (most_before + 1) + looks - 1
        at.append(binding + distance - 1)
        windows.append(recall_window(rng, n, others, min(length, n), (binding, at[-1]), looks))
    tokens, answers = np.stack([w.tokens for w in windows]), np.array([w.answers[0] for w in windows])
    return Questions(torch.from_numpy(tokens), torch.tensor(at), torch.from_numpy(answers))


@torch.inference_mode()
def count_right(model: Any, questions: Questions) -> int:
    """How many questions' answers the model, from tokens (w, n) to logits (w, n, vocabulary), holds for likeliest."""
    right = 0
    for rows in torch.arange(len(questions.at)).split(max(1, TOKENS_AT_ONCE // questions.windows.shape[1])):
        logits = model(questions.windows[rows].to(DEVICE))[torch.arange(len(rows)), questions.at[rows]]
        right += int((logits.argmax(-1).cpu() == questions.answers[rows]).sum())
    return right


def measure_recall(
    runs: list[Run],
    modes: list[Mode],
    path: Path,
    longest: int = 16,
    samples: int = 128,
    distractors: Sequence[str] = DISTRACTORS[:1],
) -> Results:
    """Right answers of runs of this task by distance and number of distractors, kept in the JSON file at `path`.

    The questions are the same for all encodings and modes of a seed; `samples` is best a multiple of L/2. Beyond 16 L
    each twice as far has half as many.
    """
    length, couples = runs[0].context_length, runs[0].data["couples"]
    looks = runs[0].data.get("looks", 1)
    settings = {"context_length": length, "couples": couples, "looks": looks, "steps": runs[0].recipe["steps"]}
    settings |= {"longest": longest, "samples": samples, "distractors": list(distractors)}

    def work(run: Run, mode: Mode) -> dict[str, pd.DataFrame]:
        model = run.model(DEVICE)
        mode.set_on(model)
        rows = []
        for kind, distance in product(distractors, octaves(length, longest)):
            asked = samples // max(1, distance // (16 * length))
            questions = ask(distance, run.seed, asked, couples, length, kind, looks)
            right = count_right(model, questions.last(length) if mode.recompute else questions)
            rows.append({"distractors": kind, "distance": distance, "right": right, "asked": asked})
        return {"right": pd.DataFrame(rows)}

    return measure(runs, modes, settings, path, work)


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): unlike the normal one, it stays in [0, 1] and holds near its ends."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # which rounding may push past the share


main = partial(train, data=RecallData, prog="python -m study.recall")

if __name__ == "__main__":
    main()
