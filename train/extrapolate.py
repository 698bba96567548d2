"""`python -m train.extrapolate runs/xpos runs/rotary`: loss against context length for trained runs.

Every context length predicts the same targets, the last L/2 bytes of windows from held-out documents; only how much
comes before them varies. L/2 targets are one whole block of blockwise attention, so that every phase of a block counts
once and targets see the same number of keys at every context from L on.

`train.modes` says in which modes; `--modes` chooses.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from train.cells import checked_device, measure_cells
from train.corpus import Document
from train.errors import UserError, command
from train.measured import octaves
from train.modes import STANDARD_MODES, Mode, all_modes
from train.report import Unit, write_report
from train.runs import Run, find_runs
from train.text import TextData
from xpos_zoo import Transformer

TOKENS_AT_ONCE = 8192
CHUNKED, CHUNKED_WINDOWS = ("dense", "BCA"), 4  # modes and windows of which the paper's own table is made

Predict = Callable[[Tensor], Tensor]  # losses (w, n) of windows (w, n + 1)


@dataclass(frozen=True)
class Settings:
    """What two measurements must share to be compared."""

    context_length: int
    steps: int
    longest: int
    windows: int
    text_sha256: str
    temperature: float
    tail: float
    data: dict[str, Any]

    @property
    def targets(self) -> int:
        return self.context_length // 2

    @property
    def contexts(self) -> list[int]:
        return octaves(self.context_length, self.longest)


S = TypeVar("S", bound=Settings)


def choose_windows(documents: Sequence[Document], length: int, count: int) -> tuple[Tensor, list[str]]:
    """Up to `count` windows (w, length) that do not overlap, from as many documents as possible, and their names.

    They are cut from a document's middle, so that early positions are no easier or harder than late ones: files begin
    in a way of their own.

    Raises:
        UserError: no document is that long.
    """
    chosen: list[tuple[str, Tensor]] = []
    long_enough = [document for document in documents if len(document.tokens) >= length]
    if not long_enough:
        longest = max(len(document.tokens) for document in documents)
        raise UserError(
            f"longest: no held-out document has the {length} tokens that a window takes, the longest has {longest}; "
            "lower --longest or hold out longer files"
        )
    for turn in range(max(len(document.tokens) // length for document in long_enough)):
        if len(chosen) >= count:
            break
        for document in long_enough:
            fit, rest = divmod(len(document.tokens), length)
            start = rest // 2 + turn * length
            if turn < fit:
                tokens = document.tokens[start : start + length].astype(np.int64)
                chosen.append((document.name, torch.from_numpy(tokens)))
    names, windows = zip(*chosen[:count], strict=True)
    return torch.stack(windows), list(names)


def held_out(
    runs: list[Run], kind: type[S], longest: int, windows: int, temperature: float, tail: float
) -> tuple[TextData, Tensor, list[str], S]:
    """The text of runs, its windows for testing that are `longest` trained lengths long, their names, and settings.

    Raises:
        UserError: `choose_windows` does, or the text is not there any more.
    """
    length, source = runs[0].data["context_length"], runs[0].text()
    text, names = choose_windows(source.documents("test"), longest * length + 1, windows)
    sha256 = hashlib.sha256(text.numpy().tobytes()).hexdigest()
    settings = kind(length, runs[0].steps, longest, len(text), sha256, temperature, tail, runs[0].data)
    return source, text, names, settings


@torch.inference_mode()
def token_losses(model: Transformer, windows: Tensor) -> Tensor:
    """Cross-entropy in nats of each token of windows (w, n + 1) but the first: (w, n)."""
    batches = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
    losses = [cross_entropy(model(b[:, :-1]).mT.float(), b[:, 1:], reduction="none") for b in batches]
    return torch.cat(losses)


def overlapped_losses(model: Transformer, windows: Tensor, stride: int) -> Tensor:
    """As `token_losses`, but from pieces of 2 * stride tokens that begin a stride apart; their second halves count.

    Of windows (w, n + 1) the n tokens must be a multiple of stride, or no more than 2 * stride.
    """
    if windows.shape[1] <= 2 * stride + 1:
        return token_losses(model, windows)
    pieces = windows.unfold(1, 2 * stride + 1, stride)  # (w, j, 2 * stride + 1)
    losses = token_losses(model, pieces.flatten(0, 1)).unflatten(0, pieces.shape[:2])
    return torch.cat((losses[:, 0], losses[:, 1:, stride:].flatten(1)), dim=1)


def predictor(model: Transformer, mode: Mode, length: int) -> Predict:
    """The losses of tokens by a model trained at `length`, in no other mode so far, from now on in this one."""
    mode.set_on(model)
    if mode.recompute:
        return partial(overlapped_losses, model, stride=length // 2)
    if model.block_size is None and (reach := mode.reach(len(model.layers), length)):
        # Pieces that long give the same, in linear time. Longer contexts are multiples of them.
        return partial(overlapped_losses, model, stride=length * 2 ** math.ceil(math.log2(reach / length)))
    return partial(token_losses, model)


def pieced_losses(predict: Predict, windows: Tensor, context: int) -> Tensor:
    """Losses of windows (w, n + 1) cut into pieces of `context` tokens that do not overlap: (w, n); n is a multiple."""
    pieces = windows.unfold(1, context + 1, context)
    return predict(pieces.flatten(0, 1)).view(len(windows), -1)


def target_losses(predict: Predict, windows: Tensor, context: int, targets: int) -> Tensor:
    """Losses of the windows' last `targets` tokens, each predicted from at most `context` tokens before it.

    One forward over the last `context` tokens predicts all of those: (w, context), the targets last. If they are fewer
    than the targets, several forwards predict them side by side: (w, targets).
    """
    if context >= targets:
        return predict(windows[:, -context - 1 :])
    return pieced_losses(predict, windows[:, -targets - 1 :], context)


def measure(model: Transformer, mode: Mode, windows: Tensor, settings: Settings, progress: tqdm) -> dict[str, Any]:
    """Mean loss of every window at every context, and mean loss at every position of the longest context.

    In the paper's own two modes also mean losses of pieces of text of each length, as its table has them.
    """
    length, rotary = settings.context_length, [attention.positions for attention in model.attentions]
    predict = predictor(model, mode, length)
    found: dict[str, Any] = {"losses": {}}
    if mode.name in CHUNKED:
        found["chunked"] = {}
    losses = torch.empty(0)
    for context in settings.contexts:
        progress.set_postfix_str(f"context {context}")
        if mode.rescale is not None:
            for attention, positions in zip(model.attentions, rotary, strict=True):
                attention.positions = mode.rescale(positions, max(1.0, context / length)).to(windows.device)
        losses = target_losses(predict, windows, context, settings.targets)
        found["losses"][context] = losses[:, -settings.targets :].mean(1).tolist()
        progress.update(context * len(windows))
        if "chunked" in found:
            found["chunked"][context] = pieced_losses(predict, windows[:CHUNKED_WINDOWS], context).mean(1).tolist()
            progress.update(settings.contexts[-1] * len(windows[:CHUNKED_WINDOWS]))
    return found | {"by_position": [round(loss, 5) for loss in losses.mean(0).tolist()]}


def cost(mode: Mode, windows: Tensor, settings: Settings) -> int:
    """Tokens that `measure` reports to its progress bar."""
    chunked = len(settings.contexts) * settings.contexts[-1] * len(windows[:CHUNKED_WINDOWS])
    return sum(settings.contexts) * len(windows) + chunked * (mode.name in CHUNKED)


def extrapolate(
    runs: list[str],
    output: str = "runs/extrapolation",
    longest: int = 64,
    windows: int = 24,
    modes: list[str] | None = None,
    temperature: float = 0.2,
    tail: float = 2.0,
    device: str = "auto",
) -> None:
    """Measure loss against context length for the runs, print a table, and write JSON, Markdown and plots.

    Args:
        runs: folders of runs, or folders that contain them; several seeds of an encoding are averaged.
        output: folder for the results; a measurement that was interrupted goes on in it.
        longest: the longest context, in training lengths; a power of two.
        windows: how many windows of held-out text.
        modes: which to measure, of dense, temperature, tail, BCA, sliding, recompute, and, for RoPE alone, NTK and
            YaRN; by default the first six.
        temperature: coefficient c of the dense mode with temperature, in which a query that sees n > L keys is
            multiplied by 1 + c ln(n / L).
        tail: power p of the dense mode with a soft tail, in which logits at distance m > L get -p ln(m / L) added.
        device: cpu, cuda, or auto.

    Raises:
        UserError: for a number out of range, a run without a checkpoint, or runs with different data.
    """
    where = checked_device(device, longest, 1, temperature=temperature, tail=tail)
    if windows < 1:
        raise UserError(f"windows must be above 0, got {windows}")
    chosen = list(dict.fromkeys(STANDARD_MODES if modes is None else modes))
    if unknown := [name for name in chosen if name not in all_modes(4)]:
        raise UserError(f"modes must be of {', '.join(all_modes(4))}, got {', '.join(unknown)}")
    if not chosen:
        raise UserError("modes must name one at least, got none")
    found = find_runs(runs)
    source, text, names, settings = held_out(found, Settings, longest, windows, temperature, tail)
    text = text.to(where)
    available = all_modes(settings.context_length, temperature, tail)
    cells = measure_cells(
        found,
        [available[name] for name in chosen],
        settings,
        Path(output),
        lambda run, mode, progress: measure(run.model(where), mode, text, settings, progress),
        lambda mode: cost(mode, text, settings),
        documents=names,
    )
    unit = Unit(source.corpus.tokenizer.unit, source.tokens_per_byte("test"))
    write_report(cells, names, settings.contexts, settings.steps, Path(output), unit)


def main(args: list[str] | None = None) -> None:
    command(extrapolate, args)


if __name__ == "__main__":
    main()
