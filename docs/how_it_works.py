"""`python docs/how_it_works.py`: the two drawings of how_it_works.md."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent
BITS = np.log2(3.5)  # that the fastest pair decays in scale_base positions
QUERY, KEY, CACHED, HIDDEN = "#0173b2", "#de8f05", "#029e73", "0.92"  # seaborn's colorblind palette


def draw_factors() -> None:
    """Base-2 logarithms of the factors of the fastest pair, at scale_base 64."""
    figure, (one, many) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    positions = np.arange(8192)
    for axes, title in (
        (one, "one origin: factors grow without end"),
        (many, "an origin for each chunk of 2,048 queries"),
    ):
        axes.axhspan(-32, 32, color="0.9", zorder=0)
        axes.set_title(title)
        axes.set_xlabel("position, tokens")
    exponent = (positions - 4096) * BITS / 64
    one.plot(positions, -exponent, color=QUERY, label="queries")
    one.plot(positions, exponent, color=KEY, label="keys")
    for start in range(0, 8192, 2048):
        middle, chunk = start + 1024, positions[start : start + 2048]
        many.plot(chunk, -(chunk - middle) * BITS / 64, color=QUERY)
        seen = positions[: start + 2048]
        factor = (seen - middle) * BITS / 64
        many.plot(seen, np.where(factor < -80, np.nan, factor), color=KEY)
    one.set_ylabel("factor, powers of 2")
    one.legend(frameon=False)
    many.text(8100, 37, "no factor leaves the grey band upwards", fontsize=8, ha="right")
    figure.savefig(FOLDER / "how_factors.png", dpi=150)


def box(axes: Axes, x: float, y: float, color: str, text: str = "", width: float = 1.0) -> None:
    axes.add_patch(Rectangle((x, y), width, 0.8, facecolor=color, edgecolor="white", linewidth=2))
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", color="white" if color != HIDDEN else "0.4")


def draw_blocks() -> None:
    figure, (blocks, cache) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(1, 1.6))
    blocks.set_title("blocks as rows of the batch")
    for row in range(4):
        y = 3 - row
        blocks.text(-0.15, y + 0.4, "first" if row == 0 else f"row {row}", ha="right", va="center")
        box(blocks, 0, y, QUERY, f"q{row}")
        if row:
            box(blocks, 1.5, y, KEY, f"k{row - 1}")
        box(blocks, 2.5, y, KEY, f"k{row}")
    cache.set_title("decoding: a copy of the query for each segment")
    for segment in range(4):
        box(cache, 2 * segment, 0, CACHED, f"keys,\ndecay from s{segment}", 2)
        box(cache, 2 * segment + 0.1, 1.6, QUERY, f"query,\ndecay from s{segment}", 1.8)
        cache.annotate("", (2 * segment + 1, 0.85), (2 * segment + 1, 1.55), arrowprops={"arrowstyle": "->"})
    for axes, right, top in ((blocks, 3.8, 4), (cache, 8.1, 2.8)):
        axes.set_xlim(-0.8 if axes is blocks else -0.1, right)
        axes.set_ylim(-0.2, top)
        axes.axis("off")
    figure.savefig(FOLDER / "how_blocks.png", dpi=150)


if __name__ == "__main__":
    draw_factors()
    draw_blocks()
