"""`python -m train.extrapolate runs/xpos runs/rotary`: loss against context length for trained runs.

Every context length predicts the same targets, the last L/2 tokens of windows from held-out documents; only how much
comes before them varies. L/2 targets are one whole block of blockwise attention, so that every phase of a block counts
once and targets see the same number of keys at every context from L on.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from train.data import Document
from train.errors import UserError, command
from train.files import replacing
from train.measure import DEVICE, Results, against, by_window, estimate, measure, octaves, panels, save_plot, table
from train.modes import Mode, discounted, standard_modes
from train.runs import Run, find_runs
from xpos_zoo import Transformer

TOKENS_AT_ONCE = 8192
CHUNKED, CHUNKED_WINDOWS = ("dense", "BCA"), 4  # modes and windows of which the paper's own table is made

Predict = Callable[[Tensor], Tensor]  # losses (w, n) of windows (w, n + 1)


def choose_windows(documents: Sequence[Document], length: int, count: int) -> tuple[Tensor, list[str]]:
    """Up to `count` windows (w, length) that do not overlap, from as many documents as possible, and their names.

    They are cut from a document's middle, so that early positions are no easier or harder than late ones: files begin
    in a way of their own.
    """
    windows: list[Tensor] = []
    names: list[str] = []
    turn, most = 0, 0
    while len(windows) < count and turn < max(1, most // length):
        for document in documents:
            most = max(most, len(document.tokens))
            fit, rest = divmod(len(document.tokens), length)
            if turn < fit:
                start = rest // 2 + turn * length
                windows.append(torch.from_numpy(document.tokens[start : start + length].astype(np.int64)))
                names.append(document.name)
            if len(windows) == count:  # reads no document more than it must
                break
        turn += 1
    if not windows:
        raise UserError(f"longest: no held-out document has the {length} tokens of a window, the longest has {most}")
    return torch.stack(windows), names


def held_out(
    runs: list[Run], longest: int, windows: int, length: int | None = None, allow_changed_text: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Windows for testing that are `longest` times `length` and one token long, and the settings of a measurement.

    Its `notes`, if there are any, say for which runs the text may not have been held out. A UserError if it was not,
    unless that is allowed.
    """
    length = length or runs[0].context_length
    if windows < 1 or longest < 1 or longest & (longest - 1):
        raise UserError(f"windows must be above 0, and longest a power of two, got {windows} and {longest}")
    text = runs[0].text()
    doubts = {f"{run.encoding}, seed {run.seed}": run.doubt(text, allow_changed_text) for run in runs}
    chosen, names = choose_windows(text.documents("test"), longest * length + 1, windows)
    digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    settings = {"context_length": length, "steps": runs[0].recipe["steps"], "longest": longest}
    settings |= {"windows": len(chosen), "text_sha256": digest, "unit": text.unit}
    settings |= {"tokens_per_byte": text.tokens_per_byte("test"), "documents": names}
    notes = [f"{name}: {doubt}" for name, doubt in doubts.items() if doubt]
    return chosen, settings | ({"notes": notes} if notes else {})


@torch.inference_mode()
def token_losses(model: Transformer, windows: Tensor, recompute: int | None = None) -> Tensor:
    """Cross-entropy in nats of each token of windows (w, n + 1) but the first: (w, n).

    With `recompute`, so many tokens at a time are predicted from a fresh window twice as long; n is a multiple.
    """
    if recompute and windows.shape[1] > 2 * recompute + 1:
        pieces = windows.unfold(1, 2 * recompute + 1, recompute)  # (w, j, 2 * recompute + 1)
        losses = token_losses(model, pieces.flatten(0, 1)).unflatten(0, pieces.shape[:2])
        return torch.cat((losses[:, 0], losses[:, 1:, recompute:].flatten(1)), dim=1)
    batches = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
    return torch.cat([cross_entropy(model(b[:, :-1]).mT.float(), b[:, 1:], reduction="none") for b in batches])


def pieced_losses(predict: Predict, windows: Tensor, context: int) -> Tensor:
    """Losses of windows (w, n + 1) cut into pieces of `context` tokens that do not overlap: (w, n)."""
    pieces = windows.unfold(1, context + 1, context)
    return predict(pieces.flatten(0, 1)).view(len(windows), -1)


def losses_of(model: Transformer, mode: Mode, windows: Tensor, length: int) -> dict[str, pd.DataFrame]:
    """Mean loss of every window at every context, and by position in the longest.

    In the paper's two modes also that of text cut into pieces of each length, as its Table 5 has it.
    """
    targets, trained = length // 2, [attention.positions for attention in model.attentions]
    losses, means, chunked = torch.empty(0), [], []
    mode.set_on(model)
    predict = partial(token_losses, model, recompute=length // 2 if mode.recompute else None)
    for context in octaves(length, windows.shape[1] // length):
        if mode.rescale is not None and context > length:
            for attention, positions in zip(model.attentions, trained, strict=True):
                attention.set_attention(**mode.rescale(positions, context / length))
        losses = pieced_losses(predict, windows[:, -max(context, targets) - 1 :], context).cpu()  # the targets last
        mean = losses[:, -targets:].mean(1)
        means.append(pd.DataFrame({"context": context, "window": range(len(mean)), "loss": mean}))
        if mode.name in CHUNKED:
            mean = pieced_losses(predict, windows[:CHUNKED_WINDOWS], context).mean()
            chunked.append({"context": context, "loss": float(mean)})
    found = {"loss": pd.concat(means), "by_position": binned(losses.mean(0).tolist())}
    return found | ({"chunked": pd.DataFrame(chunked)} if chunked else {})


def binned(losses: list[float]) -> pd.DataFrame:
    """Mean loss in bins of half an octave, with their geometric centres; losses[0] is that of position 1."""
    frame = pd.DataFrame({"position": np.arange(1, len(losses) + 1), "tokens": 1, "loss": losses})
    bins = frame.groupby(np.ceil(2 * np.log2(frame["position"])))
    return bins.agg({"position": lambda p: math.sqrt(p.min() * p.max()), "tokens": "sum", "loss": "mean"})


def measure_loss(
    runs: list[Run],
    modes: list[Mode],
    path: Path,
    longest: int = 64,
    windows: int = 24,
    length: int | None = None,
    allow_changed_text: bool = False,
) -> Results:
    """Loss of the runs against context length, in modes that may be anyone's, kept in the JSON file at `path`.

    Contexts and targets are multiples of `length`, by default the trained one.
    """
    text, settings = held_out(runs, longest, windows, length, allow_changed_text)
    text, own = text.to(DEVICE), settings["context_length"]
    return measure(runs, modes, settings, path, lambda run, mode: losses_of(run.model(DEVICE), mode, text, own))


def loss_table(results: Results, entry: Callable[[float], str] = "{:.3f}".format, name: str = "loss") -> str:
    """What `entry` makes of mean losses; `chunked` are those of the paper's table."""
    return table(results.tables[name], "context", lambda group: entry(group["loss"].mean()), results.length)


def perplexity_table(results: Results, name: str = "loss") -> str:
    return loss_table(results, lambda loss: f"{math.exp(loss):.2f}", name)


def rise_table(results: Results) -> str:
    """Paired differences against context L, with their 95 % intervals."""
    rises, entry = against(results.tables["loss"], "context", results.length), "{:+.3f} [{:+.3f}, {:+.3f}]".format
    return table(rises, "context", lambda group: entry(*estimate(by_window(group))), results.length)


def write_report(results: Results, folder: Path) -> None:
    """Print the table; write report.md and the plot."""
    settings, seeds = results.settings, sorted(set(results.tables["loss"]["seed"]))
    unit, bits = settings["unit"], settings["tokens_per_byte"] / math.log(2)
    caption = (
        f"{settings['windows']} windows of {len(set(settings['documents']))} held-out documents, seeds {seeds}; trained"
        f" at L = {results.length} for {settings['steps']} steps; the same last {results.length // 2} {unit}s of each "
        f"window are predicted at every context. Loss, nats a {unit}:\n\n{loss_table(results)}\n"
    )
    caption += "".join(f"\nNote: {note}.\n" for note in settings.get("notes", ()))
    sections = ["# Loss against context length", caption, "![the plot](extrapolation.png)"]
    sections += ["Against L, with 95 % intervals (bootstrap over seeds, then documents):", rise_table(results)]
    sections += [f"Perplexity a {unit}:", perplexity_table(results)]
    sections += ["Bits a byte:", loss_table(results, lambda loss: f"{loss * bits:.3f}")]
    if "chunked" in results.tables:
        sections += ["Perplexity of text cut into pieces of each length; longer ones have fewer early targets:"]
        sections += [perplexity_table(results, "chunked")]
    with replacing(folder / "report.md") as draft:
        draft.write_text("\n\n".join(sections) + "\n")
    grid = panels(results.tables["loss"], "context", "loss", results.length, f"loss, nats a {unit}")
    save_plot(grid, folder / "extrapolation.png")
    print(f"\n{caption}\n{folder / 'report.md'} has all tables; the plot is {folder / 'extrapolation.png'}")


def extrapolate(
    runs: list[str],
    output: str = "runs/extrapolation",
    longest: int = 64,
    windows: int = 24,
    modes: list[Literal["dense", "log-n", "tail", "BCA", "sliding", "recompute", "discount"]] | None = None,
    log_n: float = 0.2,
    tail: float = 2.0,
    discount: float = 2.0,
    allow_changed_text: bool = False,
) -> Results:
    """Measure loss against context length for the runs, print a table, and write JSON, Markdown and a plot.

    Args:
        runs: folders of runs, or folders that contain them; several seeds of an encoding are averaged.
        output: folder for the results; a measurement that was interrupted goes on in it.
        longest: the longest context, in training lengths; a power of two.
        windows: how many windows of held-out text.
        modes: which to measure; by default all that fit: a run keeps what it was trained with, but for a discount.
        log_n: coefficient c of log-n scaling: a query that sees n > L keys is multiplied by 1 + c ln(n / L).
        tail: power p of the soft tail: logits at distance m > L get -p ln(m / L) added.
        discount: of runs with scale-invariant logits: logits at distances from L on get -discount added.
        allow_changed_text: measure, with a note, also on text that has changed since the training.
    """
    found = find_runs(runs)
    try:
        length = found[0].context_length
        known = [*standard_modes(length, log_n, tail), discounted(length, discount)]
    except ValueError as error:
        raise UserError(f"log_n, tail or discount: {error}") from error
    chosen = [mode for mode in known if not modes or mode.name in modes]
    results = measure_loss(
        found, chosen, Path(output) / "results.json", longest, windows, allow_changed_text=allow_changed_text
    )
    write_report(results, Path(output))
    return results


if __name__ == "__main__":
    command(extrapolate)
