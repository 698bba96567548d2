"""`python -m study.context_use runs/xpos runs/rotary`: does a trained model use context beyond its trained length L?

Three measurements on held-out windows of several trained lengths:

1. *Far context.* Losses of the same last L/2 tokens when what lies beyond the last L is intact, shuffled (its tokens
   permuted), replaced (by as much text of another document) or absent. A model that uses far text gains from intact
   alone; one that merely bears it is the same with all.
2. *Last occurrence.* Losses in the second half of the windows by the distance to the last place where the four tokens
   that end in the target stood already. A model that sees that place can repeat it.
3. *Attention resolution* (Sun et al. 2022, eq. 3): how monotonically the expected logit falls with distance.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange, repeat
from torch import Tensor

from train.errors import UserError, command
from train.extrapolate import held_out, token_losses
from train.measure import DEVICE, Results, against, by_window, estimate, measure, octaves, table
from train.modes import Mode, standard_modes
from train.runs import Run, find_runs
from xpos_zoo import MultiHeadAttention, Transformer
from xpos_zoo.bias import bias_and_gain

MODES = ("dense", "log-n", "tail", "BCA")
FAR = ("intact", "shuffled", "replaced")
RESOLVED = ("dense", "BCA")  # modes whose logits are those of q and k alone
NGRAM = 4  # bytes: most of a short word, and seldom twice by chance
RESOLUTION_WINDOWS = 8
QUERIES_AT_ONCE = 128


def far_versions(windows: Tensor, names: list[str], length: int) -> dict[str, Tensor]:
    """Windows (w, n + 1) with what lies beyond their last `length` inputs absent, intact, shuffled and replaced.

    Shuffled: permuted at random, each window in its own way, always the same. Replaced: by the same places of the next
    window of another document.
    """
    count = len(names)
    if len(set(names)) < 2:
        raise UserError(
            f"windows must come from two documents or more, for one's text replaces the other's, got {names[0]}"
        )
    other = [next(j % count for j in range(i, i + count) if names[j % count] != names[i]) for i in range(count)]
    far, near = windows[:, : -length - 1], windows[:, -length - 1 :]
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(far.shape[1], generator=generator) for _ in far])
    changed = {"shuffled": far.gather(1, order), "replaced": far[other]}
    return {"absent": near, "intact": windows} | {name: torch.cat((text, near), 1) for name, text in changed.items()}


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


def by_occurrence(losses: Tensor, windows: Tensor) -> pd.DataFrame:
    """Mean loss of the windows' second halves by the octave of that distance, 2^k standing for 2^k .. 2^(k+1) - 1.

    A target in the second half has as much text before it at least. losses (w, n) are those of windows (w, n + 1).
    """
    half = losses.shape[1] // 2
    distances = np.array([occurrence_distances(window)[-half:] for window in windows.tolist()])
    octave = np.where(distances > 0, 2 ** np.floor(np.log2(np.maximum(distances, 1))), 0).astype(int)
    frame = pd.DataFrame({"distance": octave.ravel(), "tokens": 1, "loss": losses[:, -half:].cpu().double().flatten()})
    return frame.groupby("distance", as_index=False).agg({"tokens": "sum", "loss": "mean"})


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
def attention_inputs(model: Transformer, tokens: Tensor) -> list[tuple[MultiHeadAttention, Tensor]]:
    """Each layer's attention, and what it gets for tokens (b, n): (b, n, c)."""
    inputs: list[Tensor] = []
    norms = [layer.attention_norm for layer in model.layers]
    hooks = [norm.register_forward_hook(lambda *args: inputs.append(args[-1])) for norm in norms]  # type: ignore[union-attr]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return list(zip(model.attentions, inputs, strict=True))


def expected_scores(model: Transformer, tokens: Tensor) -> Tensor:
    """Mean logit at each distance at which the model sees keys, over rows and positions: (layers, heads, N), float64.

    As the paper's eq. 11, but of the queries and keys that tokens (b, n) have, not of an expectation over random ones.
    NaN at distances that only other layers see.
    """
    scores = torch.stack([mean_logits(*each) for each in attention_inputs(model, tokens)])
    return scores[..., ~scores.isnan().all(1).all(0)]


@torch.inference_mode()
def mean_logits(attention: MultiHeadAttention, x: Tensor) -> Tensor:
    """Mean logit of each head's visible pairs at each distance, NaN where there are none, for x (b, n, c): (h, n)."""
    sums, counts = torch.zeros(attention.num_heads, x.shape[1], dtype=torch.float64, device=x.device), 0
    for logits, distance in logits_in_chunks(attention, x):
        visible = logits[0, 0] > -torch.inf
        sums.index_add_(1, distance[visible], logits.double().mean(0)[:, visible])
        counts = counts + torch.bincount(distance[visible], minlength=x.shape[1])
    return sums / counts


@torch.inference_mode()
def attention_shares(model: Transformer, tokens: Tensor, queries: int) -> pd.DataFrame:
    """Of each layer's and head's attention from the last `queries` tokens, the share at each octave of distance.

    A distance of 2^k stands for 2^k .. 2^(k+1) - 1, and 0 for the token itself.
    """
    parts = []
    for layer, (attention, x) in enumerate(attention_inputs(model, tokens)):
        found = []
        for logits, distance in logits_in_chunks(attention, x, queries):
            octave = torch.where(distance > 0, distance.clamp(min=1).log2().floor() + 1, 0).long()
            shares = logits.new_zeros(*logits.shape[:3], 1 + (x.shape[1] - 1).bit_length())
            shares.scatter_add_(-1, octave.expand(logits.shape), logits.softmax(-1))
            found.append(shares)
        for head, share in enumerate(torch.cat(found, 2).mean((0, 2)).tolist()):
            at = [0, *(2**k for k in range(len(share) - 1))]
            parts.append(pd.DataFrame({"layer": layer, "head": head, "distance": at, "share": share}))
    return pd.concat(parts)


def logits_in_chunks(
    attention: MultiHeadAttention, x: Tensor, queries: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (b, h, q, m) of chunks of the last queries in x (b, n, c), and their distances (q, m)."""
    n, heads = x.shape[1], attention.num_heads
    q = attention.q_norm(rearrange(attention.q_proj(x), "b n (h d) -> b h n d", h=heads))
    k = attention.k_norm(rearrange(attention.k_proj(x), "b n (g d) -> b g n d", g=attention.num_kv_heads))
    k = repeat(k, "b g n d -> b (g r) n d", r=heads // attention.num_kv_heads)
    at = torch.arange(n, device=x.device)
    chunk = min(QUERIES_AT_ONCE, attention.positions.max_span(q.dtype))
    for start in range(0 if queries is None else n - queries, n, chunk):
        end = min(start + chunk, n)
        q_at, k_at = at[start:end], at[:end]
        turned = attention.positions.rotate(q[..., start:end, :], k[..., :end, :], q_at, k_at, (start + end) // 2)
        distance, visible = q_at[:, None] - k_at, attention.settings.pattern.is_visible(q_at[:, None], k_at)
        bias, gain = bias_and_gain(attention.distance_bias, distance.clamp(min=0))
        logits = turned[0] @ turned[1].mT / attention.head_dim**0.5
        if attention.query_scaling is not None:
            logits = logits * attention.query_scaling(visible.sum(-1), logits.dtype)[:, None]
        logits = (logits if gain is None else logits * gain) + bias
        yield logits.masked_fill(~visible, -torch.inf), distance


def measure_context_use(
    runs: list[Run],
    modes: list[Mode],
    path: Path,
    longest: int = 8,
    windows: int = 24,
    allow_changed_text: bool = False,
) -> Results:
    """All three measurements of runs in modes, kept in the JSON file at `path`."""
    text, settings = held_out(runs, longest, windows, allow_changed_text=allow_changed_text)
    length, targets = runs[0].context_length, runs[0].context_length // 2
    versions = far_versions(text, settings["documents"], length)

    def work(run: Run, mode: Mode) -> dict[str, pd.DataFrame]:
        model = run.model(DEVICE)
        mode.set_on(model)
        losses = {condition: token_losses(model, version.to(DEVICE)).cpu() for condition, version in versions.items()}
        means = [
            pd.DataFrame({"far": condition, "window": range(len(each)), "loss": each[:, -targets:].mean(1)})
            for condition, each in losses.items()
        ]
        found = {"far": pd.concat(means), "occurrence": by_occurrence(losses["intact"], text)}
        if mode.name in RESOLVED:
            resolved = {
                context: float(resolution(expected_scores(model, tokens)).mean())
                for context in octaves(length, longest)
                for tokens in [text[:RESOLUTION_WINDOWS, -context - 1 : -1].to(DEVICE)]
            }
            found["resolution"] = pd.DataFrame({"context": resolved.keys(), "resolution": resolved.values()})
        if mode.name == "dense":
            found["attention"] = attention_shares(model, text[:RESOLUTION_WINDOWS, :-1].to(DEVICE), targets)
        return found

    return measure(runs, modes, settings, path, work)


def far_table(results: Results) -> str:
    """Losses without far context, then paired differences with their 95 % intervals."""
    losses = results.tables["far"]
    parts: list[Any] = [losses[losses["far"] == "absent"]]
    for one, other in (*((condition, "absent") for condition in FAR), ("intact", "shuffled"), ("intact", "replaced")):
        differences: Any = against(losses, "far", other)
        parts.append(differences[differences["far"] == one].assign(far=f"{one} - {other}"))

    def entry(group: Any) -> str:
        mean, low, high = estimate(by_window(group))
        return f"{mean:.3f}" if group.name[-1] == "absent" else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"

    return table(pd.concat(parts), "far", entry)


def context_use(
    runs: list[str],
    output: str = "runs/context_use",
    longest: int = 8,
    windows: int = 24,
    allow_changed_text: bool = False,
) -> None:
    """Measure what the runs make of far context, and print a table.

    Args:
        runs: folders of runs, or folders that contain them; several seeds of an encoding are averaged.
        output: folder for results.json; a measurement that was interrupted goes on in it.
        longest: length of the windows, in trained lengths; a power of two above 1.
        windows: how many windows of held-out text.
        allow_changed_text: measure, with a note, also on text that has changed since the training.
    """
    found = find_runs(runs)
    modes = [mode for mode in standard_modes(found[0].context_length) if mode.name in MODES]
    results = measure_context_use(found, modes, Path(output) / "results.json", longest, windows, allow_changed_text)
    print(far_table(results), *(f"\nNote: {note}." for note in results.settings.get("notes", ())))


if __name__ == "__main__":
    command(context_use)
