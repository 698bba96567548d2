"""`python -m train.extrapolate runs/xpos runs/rotary`: loss against context length for trained runs.

Every context length predicts the same targets, the last L/2 bytes of windows from held-out documents; only how much
comes before them varies. L/2 targets are one whole block of blockwise attention, so that every phase of a block counts
once and targets see the same number of keys at every context from L on.

A mode is how a trained model attends when it is measured: dense; with one of the two options that keep the whole
context softly (temperature, soft tail); with one of three windows (blockwise, sliding, recompute); or, for RoPE alone,
with its angles rescaled to the context (NTK-aware, YaRN). `--modes` chooses.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from train.baselines import SlidingWindow, ntk_scaled, yarn_scaled
from train.checkpoint import difference, load_checkpoint
from train.errors import UserError, parsed, told_in_one_line
from train.files import replacing
from train.language_model import LanguageModel
from train.report import write_report
from train.text import Document, TextData
from xpos_zoo import DistanceBias, RotaryEmbedding, SoftTail, Temperature, Transformer

TOKENS_AT_ONCE = 8192
CHUNKED_WINDOWS = 4  # of which the paper's own table is made
DATA = ("context_length", "paths", "val_fraction", "test_fraction", "split_by")  # what decides on the targets
ENCODINGS = {"XPOS": "xPos", "RotaryEmbedding": "RoPE", "NoPositions": "no positions"}  # as the literature calls them
STANDARD_MODES = ("dense", "temperature", "tail", "BCA", "sliding", "recompute")


Predict = Callable[[Tensor], Tensor]  # losses (w, n) of windows (w, n + 1)


@dataclass(frozen=True)
class Mode:
    """How a trained model attends when it is measured.

    Attributes:
        block_size, temperature, distance_bias: what the `Transformer` is set to.
        recompute: whether targets are predicted from fresh windows of the trained length, half a length apart.
        rescale: gives a rotary module with its angles rescaled for a context of so many trained lengths.
    """

    name: str
    label: str
    block_size: int | None = None
    temperature: Temperature | None = None
    distance_bias: DistanceBias | None = None
    recompute: bool = False
    rescale: Callable[[Any, float], RotaryEmbedding] | None = None

    def set_on(self, model: Transformer) -> None:
        model.block_size, model.temperature = self.block_size, self.temperature
        model.distance_bias = self.distance_bias

    def fits(self, run: "Run") -> bool:
        """Whether the run can be measured so: angles of rotary embeddings alone can be rescaled."""
        return self.rescale is None or run.encoding == ENCODINGS[RotaryEmbedding.__name__]


def all_modes(length: int, temperature: float = 0.2, tail: float = 2.0) -> dict[str, Mode]:
    """Every mode for models trained at `length`, by name."""
    found = [
        Mode("dense", "dense"),
        Mode("temperature", f"dense, temperature {temperature:g}", temperature=Temperature(temperature, length)),
        Mode("tail", f"dense, soft tail {tail:g}", distance_bias=SoftTail(tail, length)),
        Mode("BCA", f"BCA, blocks of {length // 2}", block_size=length // 2),
        Mode("sliding", f"sliding window of {length}", distance_bias=SlidingWindow(length)),
        Mode("recompute", f"recompute the last {length}", recompute=True),
        Mode("NTK", "dense, NTK-aware", rescale=ntk_scaled),
        Mode("YaRN", "dense, YaRN", rescale=partial(yarn_scaled, trained_length=length)),
    ]
    return {mode.name: mode for mode in found}


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
        """L/4, L/2, L, 2L, ... up to longest * L."""
        return [self.context_length * 2**k // 4 for k in range(int(math.log2(self.longest)) + 3)]


@dataclass(frozen=True)
class Run:
    """A training: its folder, its encoding and seed, where its weights are, after how many steps, and from what."""

    folder: Path
    checkpoint: Path
    encoding: str
    seed: int
    steps: int
    data: dict[str, Any]
    recipe: dict[str, Any]  # all else that seeds of one encoding share
    positions: dict[str, Any]  # of the recipe, what encodings may differ in

    def model(self, device: torch.device) -> Transformer:
        try:
            module = LanguageModel.load_from_checkpoint(self.checkpoint, map_location=device, weights_only=True)
        except RuntimeError as error:
            raise UserError(f"{self.checkpoint} does not hold the weights of its own model: {error}") from error
        return module.transformer.eval()


def find_runs(folders: list[str]) -> list[Run]:
    """The runs in and below the folders.

    Raises:
        UserError: a folder does not exist or holds no run, a checkpoint is damaged, or the runs are not comparable.
    """
    paths: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"runs: there is no folder {str(folder)!r}")
        checkpoints = sorted(folder.rglob("checkpoints/last.ckpt"))
        if not checkpoints:
            raise UserError(f"runs: there is no checkpoint in {str(folder)!r}; `python -m train fit` writes one")
        for path in checkpoints:
            paths.setdefault(path.resolve(), path)
    runs = [read_run(path) for path in paths.values()]
    for run in runs[1:]:
        if run.data != runs[0].data:
            raise UserError(
                f"runs: {run.folder} and {runs[0].folder} differ in data or context length, so they have no common "
                f"targets: {run.data} and {runs[0].data}"
            )
        if run.steps != runs[0].steps:
            raise UserError(
                f"runs: {run.folder} has {run.steps} steps and {runs[0].folder} has {runs[0].steps}; `python -m train "
                "fit` goes on with one that was interrupted"
            )
        if changed := difference(run.recipe, runs[0].recipe):
            raise UserError(f"runs: {runs[0].folder} is trained otherwise than {run.folder} ({changed})")
    for run, other in combinations(runs, 2):
        if run.encoding == other.encoding:
            if changed := difference(run.positions, other.positions):
                raise UserError(f"runs: {other.folder} is no seed of the model in {run.folder} ({changed})")
            if run.seed == other.seed:
                raise UserError(f"runs: {run.folder} and {other.folder} are both seed {run.seed} of {run.encoding}")
    return runs


def read_run(path: Path) -> Run:
    content = load_checkpoint(path)
    data, model = content["datamodule_hyper_parameters"], content["hyper_parameters"]
    encoding = str(model["positions"]["class_path"]).rpartition(".")[2]
    apart = {"positions", "scale_base", "context_length", "compile", "_instantiator"}
    return Run(
        folder=path.parent.parent,
        checkpoint=path,
        encoding=ENCODINGS.get(encoding, encoding),
        seed=data["seed"],
        steps=content["global_step"],
        data={name: data[name] for name in DATA},
        recipe={"batch_size": data["batch_size"]} | {k: v for k, v in model.items() if k not in apart},
        positions={name: model[name] for name in ("positions", "scale_base")},
    )


def choose_windows(documents: list[Document], length: int, count: int) -> tuple[Tensor, list[str]]:
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
            f"longest: no held-out document has the {length} bytes that a window takes, the longest has {longest}; "
            "lower --longest or hold out longer files"
        )
    for turn in range(max(len(document.tokens) // length for document in long_enough)):
        for document in long_enough:
            fit, rest = divmod(len(document.tokens), length)
            start = rest // 2 + turn * length
            if turn < fit:
                chosen.append((document.name, document.tokens[start : start + length].long()))
    names, windows = zip(*chosen[:count], strict=True)
    return torch.stack(windows), list(names)


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
    """The losses of tokens by a model trained at `length`, from now on in this mode."""
    mode.set_on(model)
    if mode.recompute:
        return partial(overlapped_losses, model, stride=length // 2)
    if isinstance(mode.distance_bias, SlidingWindow):
        # Through all layers a token sees less than this: pieces give the same, in linear time.
        reach = mode.distance_bias.size * len(model.layers)
        return partial(overlapped_losses, model, stride=2 ** math.ceil(math.log2(reach)))
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
    if mode.name in ("dense", "BCA"):
        found["chunked"] = {}
    losses = torch.empty(0)
    for context in settings.contexts:
        progress.set_postfix_str(f"context {context}")
        if mode.rescale is not None:
            for attention, positions in zip(model.attentions, rotary, strict=True):
                attention.positions = mode.rescale(positions, max(1.0, context / length))
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
    return sum(settings.contexts) * len(windows) + chunked * (mode.name in ("dense", "BCA"))


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
    if longest < 1 or longest & (longest - 1):
        raise UserError(f"longest must be a power of two, got {longest}")
    if windows < 1:
        raise UserError(f"windows must be above 0, got {windows}")
    for name, value in (("temperature", temperature), ("tail", tail)):
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be 0 or above and finite, got {value}")
    chosen = list(dict.fromkeys(STANDARD_MODES if modes is None else modes))
    if unknown := [name for name in chosen if name not in all_modes(4)]:
        raise UserError(f"modes must be of {', '.join(all_modes(4))}, got {', '.join(unknown)}")
    if not chosen:
        raise UserError("modes must name one at least, got none")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and there is none here; give auto or cpu")
    found = find_runs(runs)
    data, length = found[0].data, found[0].data["context_length"]
    if length % 4:
        raise UserError(f"runs: the context length must be a multiple of 4, got {length}")
    text, names = choose_windows(TextData(**data).documents("test"), longest * length + 1, windows)
    text_sha256 = hashlib.sha256(text.numpy().tobytes()).hexdigest()
    settings = Settings(length, found[0].steps, longest, len(text), text_sha256, temperature, tail, data)

    for run in found:
        run.model(torch.device("cpu"))  # complains before anything is measured
    folder = Path(output)
    available = all_modes(length, temperature, tail)
    cells = [
        (cell_of(run, mode), run, mode)
        for mode in (available[name] for name in chosen)
        for run in found
        if mode.fits(run)
    ]
    if not cells:
        raise UserError(f"modes: {', '.join(chosen)} fit none of the runs; they rescale the angles of RoPE")
    measured = earlier_cells(folder, settings)
    missing = [entry for entry in cells if key_of(entry[0]) not in measured]
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    text = text.to("cuda" if use_cuda else "cpu")
    total = sum(cost(mode, text, settings) for _, _, mode in missing)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not missing) as progress:
        for cell, run, mode in missing:
            progress.set_description(f"{run.encoding} seed {run.seed}, {mode.label}")
            measured[key_of(cell)] = cell | measure(run.model(text.device), mode, text, settings, progress)
            results = {"settings": asdict(settings), "documents": names, "cells": list(measured.values())}
            with replacing(folder / "results.json") as draft:
                draft.write_text(json.dumps(results))
    write_report([measured[key_of(cell)] for cell, _, _ in cells], names, settings.contexts, settings.steps, folder)


def cell_of(run: Run, mode: Mode) -> dict[str, Any]:
    """What a measurement is of."""
    sha256 = hashlib.sha256(run.checkpoint.read_bytes()).hexdigest()
    return {
        "encoding": run.encoding,
        "mode": mode.name,
        "label": mode.label,
        "seed": run.seed,
        "run": str(run.folder),
        "checkpoint_sha256": sha256,
    }


def key_of(cell: dict[str, Any]) -> tuple[str, str]:
    return cell["mode"], cell["checkpoint_sha256"]


def earlier_cells(folder: Path, settings: Settings) -> dict[tuple[str, str], dict[str, Any]]:
    """What an earlier call with the same settings measured in the folder, by its keys.

    Raises:
        UserError: the folder holds results with other settings, or damaged ones.
    """
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
        there = dict(results["settings"])
        cells = {key_of(cell): cell for cell in results["cells"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output: {path} holds no results, or damaged ones; give another --output, or remove it"
        ) from error
    changed = [f"{k} {there.get(k)} there, {v} here" for k, v in asdict(settings).items() if there.get(k) != v]
    if changed:
        raise UserError(
            f"output: {path} has other settings ({'; '.join(changed)}); give another --output, or remove it"
        )
    return cells


def main(args: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m train.extrapolate", description=__doc__, exit_on_error=False)
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders that contain them")
    parser.add_function_arguments(extrapolate, skip={"runs"})
    with told_in_one_line():
        extrapolate(**parsed(parser, args).as_dict())


if __name__ == "__main__":
    main()
