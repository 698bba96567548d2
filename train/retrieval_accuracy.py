"""`python -m train.retrieval_accuracy runs/retrieval`: accuracy of recall by distance, for runs of `train.retrieval`.

From binding to question, both counted, are D tokens, for D = L/4, L/2, L, ..., longest * L, L being the trained length.
Before the binding are 0 to L/2 - 1 tokens, each number equally often, so that every phase of a block of L/2 counts the
same. All other tokens are fillers and couples of other keys, as dense as in training and as far apart as there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from train.cells import checked_device, measure_cells
from train.errors import UserError, command
from train.extrapolate import TOKENS_AT_ONCE
from train.measured import octaves
from train.modes import STANDARD_MODES, Mode, all_modes
from train.retrieval import STREAMS, recall_window
from train.retrieval_report import write_report
from train.runs import Task, find_runs
from xpos_zoo import Transformer

RECALL = Task("python -m train.retrieval fit", ("context_length", "couples"))


@dataclass(frozen=True)
class Settings:
    """What two measurements must share to be compared."""

    context_length: int
    couples: int
    steps: int
    longest: int
    samples: int
    seed: int
    temperature: float
    tail: float

    @property
    def distances(self) -> list[int]:
        return octaves(self.context_length, self.longest)

    def modes(self) -> list[Mode]:
        known = all_modes(self.context_length, self.temperature, self.tail)
        return [known[name] for name in STANDARD_MODES]


@dataclass(frozen=True)
class Questions:
    """Windows (w, n), where the question that is posed is in each, (w,), and the token that answers it, (w,)."""

    windows: Tensor
    at: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def last(self, length: int) -> "Questions":
        """The same with no more than the last `length` tokens, the question included."""
        first = (self.at + 1 - length).clamp(min=0)
        kept = first[:, None] + torch.arange(min(length, self.windows.shape[1]), device=first.device)
        return Questions(self.windows.gather(1, kept), self.at - first, self.answers)


def ask(distance: int, run_seed: int, settings: Settings) -> Questions:
    """Questions `distance` tokens from their bindings; the same for all encodings and modes of a run's seed."""
    most_before = settings.context_length // 2 - 1
    length = most_before + distance
    others = max(1, round(settings.couples * length / settings.context_length) - 1)
    longest = min(settings.context_length, length)
    windows, at = [], []
    for i in range(settings.samples):
        rng = np.random.default_rng((STREAMS["measure"], settings.seed, run_seed, distance, i))
        binding = i % (most_before + 1)
        at.append(binding + distance - 1)
        windows.append(recall_window(rng, length, others, longest, posed=(binding, at[-1])))
    tokens, answers = (np.stack([w.tokens for w in windows]), np.array([w.answers[0] for w in windows]))
    return Questions(torch.from_numpy(tokens), torch.tensor(at), torch.from_numpy(answers))


@torch.inference_mode()
def count_right(model: Any, questions: Questions) -> int:
    """How many questions' answers the model, from tokens (w, n) to logits (w, n, vocabulary), holds for likeliest."""
    right = 0
    for rows in torch.arange(len(questions)).split(max(1, TOKENS_AT_ONCE // questions.windows.shape[1])):
        logits = model(questions.windows[rows])[torch.arange(len(rows)), questions.at[rows]]
        right += int((logits.argmax(-1) == questions.answers[rows]).sum())
    return right


def measure(
    model: Transformer, mode: Mode, run_seed: int, settings: Settings, device: torch.device, progress: tqdm
) -> dict[str, Any]:
    """The number of right answers at every distance."""
    mode.set_on(model)
    right = {}
    for distance in settings.distances:
        progress.set_postfix_str(f"distance {distance}")
        asked = ask(distance, run_seed, settings)
        if mode.recompute:
            asked = asked.last(settings.context_length)
        asked = Questions(asked.windows.to(device), asked.at.to(device), asked.answers.to(device))
        right[distance] = count_right(model, asked)
        progress.update(distance * settings.samples)
    return {"right": right}


def retrieval_accuracy(
    runs: list[str],
    output: str = "runs/retrieval/accuracy",
    longest: int = 16,
    samples: int = 128,
    seed: int = 1,
    temperature: float = 0.2,
    tail: float = 2.0,
    device: str = "auto",
) -> None:
    """Measure accuracy of recall against distance for the runs, print a table, and write JSON, Markdown and a plot.

    Args:
        runs: folders of runs, or folders that contain them; several seeds of an encoding are pooled.
        output: folder for the results; a measurement that was interrupted goes on in it.
        longest: the longest distance, in training lengths; a power of two.
        samples: how many questions a distance and run; best a multiple of L/2, so that every phase counts the same.
        seed: of the questions.
        temperature: coefficient c of the dense mode with temperature, in which a query that sees n > L keys is
            multiplied by 1 + c ln(n / L).
        tail: power p of the dense mode with a soft tail, in which -p ln(m / L) is added to the logits of keys at a
            distance m > L.
        device: cpu, cuda, or auto.

    Raises:
        UserError: for a number out of range, a run without a checkpoint, or runs that are not comparable.
    """
    where = checked_device(device, longest, 1, temperature=temperature, tail=tail)
    if samples < 1:
        raise UserError(f"samples must be above 0, got {samples}")
    if seed < 0:
        raise UserError(f"seed must be 0 or above, got {seed}")
    found = find_runs(runs, RECALL)
    length, couples = found[0].data["context_length"], found[0].data["couples"]
    settings = Settings(length, couples, found[0].steps, longest, samples, seed, temperature, tail)
    modes = settings.modes()
    cells = measure_cells(
        found,
        modes,
        settings,
        Path(output),
        lambda run, mode, progress: measure(run.model(where), mode, run.seed, settings, where, progress),
        lambda _: sum(settings.distances) * samples,
    )
    reaches = {mode.name: mode.reach(found[0].recipe["num_layers"], length) for mode in modes}
    write_report(cells, reaches, settings, Path(output))


def main(args: list[str] | None = None) -> None:
    command(retrieval_accuracy, args)


if __name__ == "__main__":
    main()
