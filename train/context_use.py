"""`python -m train.context_use runs/xpos runs/rotary`: does a trained model use context beyond its trained length L?

Three measurements on held-out windows of several trained lengths:

1. *Far context.* Losses of the same last L/2 bytes when what lies beyond the last L tokens is intact, shuffled (its
   tokens permuted), replaced (by as much text of another document) or absent. A model that uses far text gains from
   intact alone; one that merely bears it is the same with all.
2. *Last occurrence.* Losses in the second half of the windows by the distance to the last place where the four bytes
   that end in the target stood already. A model that sees that place can repeat it.
3. *Attention resolution* (Sun et al. 2022, eq. 3): how monotonically the expected logit falls with distance.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from torch import Tensor
from tqdm import tqdm

from train import extrapolate
from train.cells import checked_device, measure_cells
from train.errors import UserError, command
from train.extrapolate import held_out, token_losses
from train.figures import STYLES, by_length, colour_of, finish, new_plot, table, weight
from train.files import replacing
from train.measured import Line, gathered, in_lengths, interval, on_intervals, seeds_of
from train.modes import Mode, all_modes
from train.runs import find_runs
from xpos_zoo import MultiHeadAttention, Transformer
from xpos_zoo.plan import sees

MODES = ("dense", "temperature", "tail", "BCA")
RESOLVED = ("dense", "BCA")  # modes whose logits are those of q and k alone
NGRAM = 4  # bytes: most of a short word, and seldom twice by chance
RESOLUTION_WINDOWS = 8
QUERIES_AT_ONCE = 128
MARKERS = {"intact": "o", "shuffled": "^", "replaced": "s"}


class Settings(extrapolate.Settings):
    """As there; `longest` is the length of the windows."""

    @property
    def repeats(self) -> int:
        """Targets of last occurrence in a window: its second half, so that each has as much text before it at least."""
        return self.longest * self.context_length // 2

    @property
    def bins(self) -> int:
        """Octaves that distances within a window are in; one bin more is for `never`."""
        return (self.longest * self.context_length - 1).bit_length()

    @property
    def modes(self) -> list[Mode]:
        known = all_modes(self.context_length, self.temperature, self.tail)
        return [known[name] for name in MODES]


# --- far context -----------------------------------------------------------------------------------------------------


def far_versions(windows: Tensor, names: list[str], length: int) -> dict[str, Tensor]:
    """Windows (w, n + 1) with what lies beyond their last `length` inputs absent, intact, shuffled and replaced.

    Shuffled: permuted at random, each window in its own way, always the same. Replaced: by the same places of the next
    window of another document.

    Raises:
        UserError: all windows are of one document.
    """
    far, near = windows[:, : -length - 1], windows[:, -length - 1 :]
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(far.shape[1], generator=generator) for _ in far]).to(far.device)
    other = far[others(names)]
    return {
        "absent": near,
        "intact": windows,
        "shuffled": torch.cat((far.gather(1, order), near), 1),
        "replaced": torch.cat((other, near), 1),
    }


def others(names: list[str]) -> list[int]:
    """For each window the index of the next one, round about, of another document."""
    if len(set(names)) < 2:
        raise UserError(
            f"windows must come from two documents at least, as one's text replaces the other's, but all are of "
            f"{names[0]}; give more --windows, lower --longest, or hold out more files"
        )
    count = len(names)
    return [
        next(j % count for j in range(i + 1, i + count) if names[j % count] != name) for i, name in enumerate(names)
    ]


# --- last occurrence -------------------------------------------------------------------------------------------------


def occurrence_distances(window: list[int]) -> list[int]:
    """For each token the distance back to the last place where the NGRAM tokens that end in it ended before; 0: never.

    The earlier n-gram may overlap the later one, but must lie in the window whole.
    """
    last: dict[tuple[int, ...], int] = {}
    distances = []
    for at in range(len(window)):
        gram = tuple(window[max(0, at + 1 - NGRAM) : at + 1])
        distances.append(at - last.get(gram, at))  # the first ones are shorter than any that comes later
        last[gram] = at
    return distances


def occurrence_bins(windows: Tensor, settings: Settings) -> Tensor:
    """For the last targets of each window the octave of that distance, floor(log2), or the last bin: (w, repeats)."""
    distances = [occurrence_distances(window)[-settings.repeats :] for window in windows.tolist()]
    return torch.tensor([[d.bit_length() - 1 if d else settings.bins for d in row] for row in distances])


def sums_by_bin(losses: Tensor, bins: Tensor, count: int) -> list[list[float]]:
    """Each window's losses (w, t) summed in each of `count` bins: (w, count)."""
    sums = torch.zeros(len(losses), count, dtype=torch.float64)
    return sums.scatter_add(1, bins, losses.double().cpu()).tolist()


# --- resolution ------------------------------------------------------------------------------------------------------


def resolution(scores: Tensor) -> Tensor:
    """Attention resolution of expected logits s_i (..., N) at distances i = 0 .. N-1 (Sun et al. 2022, eq. 3): (...).

        R(s) = sum_i e^(s_i) (e^(s_i) - e^(s_(i+1))) / (sum_i e^(s_i))^2

    The sum above runs over the distances that have a next one. Few near distances that are told apart make it large; it
    falls as far ones take their share of the attention, or where logits rise with distance. A row may end in NaN, which
    do not count.
    """
    weights = torch.where(scores.isnan(), -torch.inf, scores.double()).softmax(-1)
    terms = weights[..., :-1] * (weights[..., :-1] - weights[..., 1:])
    return terms.masked_fill(scores[..., 1:].isnan(), 0).sum(-1)


@torch.inference_mode()
def expected_scores(model: Transformer, tokens: Tensor) -> Tensor:
    """Mean logit at each distance at which the model sees keys, over rows and positions: (layers, heads, N), float64.

    As the paper's eq. 11, but of the queries and keys that tokens (b, n) have, not of an expectation over random ones.
    NaN at distances that only other layers see.
    """
    inputs: list[Tensor] = []
    hooks = [each.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for each in model.attentions]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    scores = torch.stack([mean_logits(*each) for each in zip(model.attentions, inputs, strict=True)])
    return scores[..., ~scores.isnan().all(1).all(0)]


def mean_logits(attention: MultiHeadAttention, x: Tensor) -> Tensor:
    """Mean logit of each head's visible pairs at each distance, NaN where there are none, for x (b, n, c): (h, n)."""
    n, heads = x.shape[1], attention.num_heads
    q = rearrange(attention.q_proj(x), "b n (h d) -> b h n d", h=heads)
    k = rearrange(attention.k_proj(x), "b n (g d) -> b g n d", g=attention.num_kv_heads)
    k = repeat(k, "b g n d -> b (g r) n d", r=heads // attention.num_kv_heads)
    at = torch.arange(n, device=x.device)
    sums = torch.zeros(heads, n, dtype=torch.float64, device=x.device)
    counts = torch.zeros(n, dtype=torch.int64, device=x.device)
    chunk = min(QUERIES_AT_ONCE, attention.positions.max_span(q.dtype))
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        q_at, k_at = at[start:end], at[:end]
        turned = attention.positions.rotate(q[..., start:end, :], k[..., :end, :], q_at, k_at, (start + end) // 2)
        logits = turned[0] @ turned[1].mT / attention.head_dim**0.5
        distance = q_at[:, None] - k_at
        for bias in attention.pattern.biases:
            logits = logits + bias(distance)
        visible = sees(q_at, k_at, attention.block_size)
        sums.index_add_(1, distance[visible], logits.double().mean(0)[:, visible])
        counts += torch.bincount(distance[visible], minlength=n)
    return sums / counts


# --- whole measurements ----------------------------------------------------------------------------------------------


def measure(
    model: Transformer, mode: Mode, versions: dict[str, Tensor], bins: Tensor, settings: Settings, progress: tqdm
) -> dict[str, Any]:
    """All three measurements of a model in a mode."""
    mode.set_on(model)
    losses = {}
    for condition, windows in versions.items():
        progress.set_postfix_str(condition)
        losses[condition] = token_losses(model, windows)
        progress.update(windows[:, 1:].numel())
    resolutions = {}
    for context in settings.contexts if mode.name in RESOLVED else []:
        progress.set_postfix_str(f"resolution at {context}")
        tokens = versions["intact"][:RESOLUTION_WINDOWS, -context - 1 : -1]
        scores = expected_scores(model, tokens)
        resolutions[context] = [float(resolution(scores).mean()), float(resolution(scores.nanmean((0, 1))))]
        progress.update(tokens.numel())
    return {
        "losses": {condition: each[:, -settings.targets :].mean(1).tolist() for condition, each in losses.items()},
        "sums_by_distance": sums_by_bin(losses["intact"][:, -settings.repeats :], bins, settings.bins + 1),
        "resolution": resolutions,
    }


def context_use(
    runs: list[str],
    output: str = "runs/context_use",
    longest: int = 8,
    windows: int = 24,
    temperature: float = 0.2,
    tail: float = 2.0,
    device: str = "auto",
) -> None:
    """Measure what the runs make of far context, print a table, and write JSON, Markdown and plots.

    Args:
        runs: folders of runs, or folders that contain them; several seeds of an encoding are averaged.
        output: folder for the results; a measurement that was interrupted goes on in it.
        longest: length of the windows, in trained lengths; a power of two above 1.
        windows: how many windows of held-out text.
        temperature: coefficient of the mode with temperature; see `train.extrapolate`.
        tail: power of the mode with a soft tail; see there.
        device: cpu, cuda, or auto.

    Raises:
        UserError: for a number out of range, a run without a checkpoint, or runs with different data.
    """
    where = checked_device(device, longest, 2, temperature=temperature, tail=tail)
    if windows < 2:
        raise UserError(f"windows must be 2 or above, got {windows}")
    found = find_runs(runs)
    source, text, names, settings = held_out(found, Settings, longest, windows, temperature, tail)
    versions = far_versions(text.to(where), names, settings.context_length)
    bins = occurrence_bins(text, settings)
    text_tokens = sum(version[:, 1:].numel() for version in versions.values())
    resolution_tokens = sum(settings.contexts) * min(RESOLUTION_WINDOWS, len(text))
    cells = measure_cells(
        found,
        settings.modes,
        settings,
        Path(output),
        lambda run, mode, progress: measure(run.model(where), mode, versions, bins, settings, progress),
        lambda mode: text_tokens + resolution_tokens * (mode.name in RESOLVED),
        documents=names,
    )
    write_report(cells, names, bins, settings, Path(output), source.corpus.tokenizer.unit)


# --- the report ------------------------------------------------------------------------------------------------------


class Used(Line):
    """Measurements of an encoding in a mode, its seeds together."""

    def __init__(self, cells: list[dict[str, Any]]):
        super().__init__(cells)
        cells = self.cells
        self.losses = {c: np.array([cell["losses"][c] for cell in cells]) for c in ("absent", *MARKERS)}
        self.sums = np.array([cell["sums_by_distance"] for cell in cells]).mean(0).sum(0)
        # (runs, 2): the mean over heads, and that of mean logits. JSON turns the contexts into strings.
        resolutions = [{int(context): both for context, both in cell["resolution"].items()} for cell in cells]
        self.resolutions = {context: np.array([each[context] for each in resolutions]) for context in resolutions[0]}

    def against(self, condition: str, other: str, documents: list[str]) -> tuple[float, float, float]:
        """Mean paired difference of two conditions' losses, and its interval."""
        difference = self.losses[condition] - self.losses[other]
        return float(difference.mean()), *interval(difference, documents)

    def look(self) -> dict[str, Any]:
        """Colour by encoding, line style and marker by mode; RoPE wide and pale, so that equal lines are both seen."""
        style, marker = STYLES[MODES.index(self.mode) % len(STYLES)]
        return {"linestyle": style, "marker": marker, "color": colour_of(self)} | weight(self, 5)


def write_report(
    cells: list[dict[str, Any]],
    documents: list[str],
    bins: Tensor,
    settings: Settings,
    folder: Path,
    unit: str = "byte",
) -> None:
    """Print the table of far context; write report.md and the three plots into the folder."""
    lines = gathered(cells, Used)
    counts = torch.bincount(bins.flatten(), minlength=settings.bins + 1).tolist()
    length = settings.context_length
    caption = (
        f"{len(documents)} windows of {in_lengths(settings.longest * length, length)} from {len(set(documents))} "
        f"held-out documents, {seeds_of(lines)}; trained at L = {length} for {settings.steps} steps."
    )

    def difference(line: Used, condition: str, other: str) -> str:
        return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*line.against(condition, other, documents))

    pairs = [(c, "absent") for c in MARKERS] + [("intact", "shuffled"), ("intact", "replaced")]
    far = table(
        ["far context", "absent", *(f"{condition} - {other}" for condition, other in pairs)],
        [[x.name, f"{x.losses['absent'].mean():.3f}", *(difference(x, *pair) for pair in pairs)] for x in lines],
    )
    filled = [k for k, count in enumerate(counts) if count]
    occurrence = table(
        [f"{unit}s back", *(bin_name(k, settings) for k in filled)],
        [
            ["targets", *(str(counts[k]) for k in filled)],
            *([line.name, *(f"{line.sums[k] / counts[k]:.3f}" for k in filled)] for line in lines),
        ],
    )
    resolved = [line for line in lines if line.resolutions]
    by_head, pooled = (
        by_length(resolved, settings.contexts, length, lambda line, c, kind=kind: spread(line.resolutions[c][:, kind]))
        for kind in (0, 1)
    )
    report = [
        "# Is far context used?",
        "",
        caption,
        "",
        "## Far context",
        "",
        f"Loss in nats a {unit} of the last {settings.targets} {unit}s of each window, when what lies beyond the last "
        f"L = {length} tokens is absent; then paired differences with 95 % intervals. Below zero, the first of the two "
        "is the better context.",
        "",
        *far,
        "",
        on_intervals(lines),
        "",
        "![differences of loss](context_use.png)",
        "",
        "## Last occurrence",
        "",
        f"Loss in nats a {unit} of the last {settings.repeats} {unit}s of each window, by the distance from the target "
        f"back to the last place where the {NGRAM} {unit}s that end in it stood before in the window. Far n-grams are "
        "rare ones: compare down a column, not along a row.",
        "",
        *occurrence,
        "",
        "![loss by last occurrence](occurrence.png)",
        "",
        "## Attention resolution",
        "",
        "R(s) = sum_i e^(s_i) (e^(s_i) - e^(s_(i+1))) / (sum_i e^(s_i))^2, where s_i is a head's mean logit of visible "
        f"pairs at distance i over positions and {min(RESOLUTION_WINDOWS, len(documents))} windows; the mean of R over "
        "layers and heads, then over seeds, with their range.",
        "",
        *by_head,
        "",
        "The same where s_i is the mean logit over layers and heads, too. No head attends by that mean, and the two "
        "need not rank encodings alike.",
        "",
        *pooled,
        "",
        "![resolution against context length](resolution.png)",
        "",
    ]
    with replacing(folder / "report.md") as draft:
        draft.write_text("\n".join(report))
    plot_far(lines, documents, length, folder / "context_use.png", unit)
    plot_occurrence(lines, counts, settings, folder / "occurrence.png", unit)
    plot_resolution(resolved, settings, folder / "resolution.png", unit)
    print("\n".join(["", caption, "", *far, ""]))
    print(f"{folder / 'report.md'} has all tables; the plot is {folder / 'context_use.png'}")


def bin_name(k: int, settings: Settings) -> str:
    if k == settings.bins:
        return "never"
    first, last = 2**k, min(2 ** (k + 1), settings.longest * settings.context_length) - 1
    return f"{first} to {last}" if last > first else str(first)


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.4f}" + f" ({values.min():.4f} to {values.max():.4f})" * (len(values) > 1)


def plot_far(lines: list[Used], documents: list[str], length: int, path: Path, unit: str) -> None:
    """Differences against no far context, with intervals, a row for each encoding and mode."""
    figure = Figure(figsize=(9, 5.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot(
        title=f"What text beyond the last L = {length} {unit}s changes",
        xlabel=f"loss with it less loss without, nats a {unit} (linear up to 0.01, then logarithmic)",
    )
    for row, line in enumerate(lines):
        for shift, (condition, marker) in zip((-0.22, 0, 0.22), MARKERS.items(), strict=True):
            mean, low, high = line.against(condition, "absent", documents)
            label = f"far text {condition}" if row == 0 else None
            look = {"marker": marker, "color": colour_of(line), "markersize": 6, "capsize": 3}
            error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            axes.errorbar(mean, row + shift, xerr=error, linestyle="none", label=label, **look)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    finish(figure, axes, path)


def plot_occurrence(lines: list[Used], counts: list[int], settings: Settings, path: Path, unit: str) -> None:
    """Loss against the distance to the last occurrence; on the right, that of targets that have none."""
    figure, axes = new_plot(
        settings.context_length, f"Loss by where the last {NGRAM} {unit}s, target included, stood before", unit
    )
    filled = [k for k in range(settings.bins) if counts[k]]
    centres = [math.sqrt(2**k * (2 ** (k + 1) - 1)) for k in filled]
    never = 2.0 ** (settings.bins + 1)
    for line in lines:
        look = line.look()
        axes.plot(centres, [line.sums[k] / counts[k] for k in filled], label=line.name, **look)
        if counts[-1]:
            look["linestyle"] = "none"
            axes.plot([never], [line.sums[-1] / counts[-1]], **look)
    octaves = [2**k for k in range(settings.bins + 1)]
    axes.set_xlabel(f"distance back to it, {unit}s (log scale)")
    axes.set_xticks([*octaves, never], [*map(str, octaves), "never"])
    axes.xaxis.set_minor_locator(NullLocator())
    finish(figure, axes, path)


def plot_resolution(lines: list[Used], settings: Settings, path: Path, unit: str) -> None:
    """Mean resolution of heads against context length: the mean over seeds, and each seed as a dot."""
    figure, axes = new_plot(settings.context_length, "Attention resolution of heads, by context length")
    for line in lines:
        look = line.look()
        each = np.array([line.resolutions[context][:, 0] for context in settings.contexts])
        axes.plot(settings.contexts, each.mean(1), label=line.name, **look)
        axes.plot(settings.contexts, each, ".", color=look["color"], markersize=3)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel(f"context length, {unit}s (log scale; dots are single seeds)")
    axes.set_ylabel("attention resolution R, no unit")
    axes.set_xticks(settings.contexts, [str(context) for context in settings.contexts])
    axes.xaxis.set_minor_formatter(NullFormatter())
    finish(figure, axes, path)


def main(args: list[str] | None = None) -> None:
    command(context_use, args)


if __name__ == "__main__":
    main()
