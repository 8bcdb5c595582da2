"""A picture of a replayed call: how large the error is, by chunk and head."""

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .replay import Heat, Replay

_MOST_TICKS = 40
_RANGE = 1e4  # of colours, above and below the limit
_NOT_FINITE = "#7b1fa2"


def plot_heat(replay: Replay) -> Figure:
    """Draw the errors of a replay over chunks and heads; blue is within the limit, red beyond.

    The first chunk beyond its limit has a frame. NaN and Inf have a colour of their own.

    Args:
        replay: with errors over chunks and heads: `heat` is not None.
    """
    heat = replay.heat
    assert heat is not None
    values = np.array(heat.values, dtype=np.float64).reshape(len(heat.chunks), -1).T  # [heads, chunks]
    heads, chunks = values.shape
    figure = Figure(figsize=(min(3 + 0.35 * chunks, 14), min(2 + 0.3 * heads, 9)), layout="constrained")
    axes = figure.subplots()
    colours = _colours()
    shown = np.where(np.isfinite(values), np.clip(values, 1 / _RANGE, _RANGE), np.nan)
    image = axes.imshow(
        shown, cmap=colours, norm=LogNorm(1 / _RANGE, _RANGE), aspect="auto", interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("error / limit")
    bar.ax.axhline(1, color="black", linewidth=1)
    every = max(1, -(-chunks // _MOST_TICKS))
    axes.set_xticks(range(0, chunks, every), [_chunk(heat, i) for i in range(0, chunks, every)], rotation=90)
    every = max(1, -(-heads // _MOST_TICKS))
    axes.set_yticks(range(0, heads, every))
    axes.set(xlabel=_xlabel(heat), ylabel="value head", title=f"{heat.name}: {replay.subject}")
    if heat.first is not None:
        chunk, head = heat.first
        axes.add_patch(Rectangle((chunk - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))
    return figure


def _colours() -> Colormap:
    return colormaps["RdBu_r"].with_extremes(bad=_NOT_FINITE)


def _chunk(heat: Heat, i: int) -> str:
    sequence, chunk = heat.chunks[i]
    return f"{sequence}" if heat.name == "final_state" else f"{sequence}:{chunk}"


def _xlabel(heat: Heat) -> str:
    return "sequence" if heat.name == "final_state" else "sequence:chunk"
