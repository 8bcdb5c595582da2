"""A picture of the collectives of data-parallel ranks: what `ascend-twin replay` shows of a trace of them."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..fixtures.store import Fixture
from ..scheduler.collectives import FORWARD, GATHER, HAS_UNFINISHED
from .traced_collectives import NAMES, Entry, find_mistake, read_group

_MOST_DRAWN = 120  # collectives of a rank, around the first that is wrong
_COLORS = {FORWARD: "#3d6fb6", HAS_UNFINISHED: "#c9a227", GATHER: "#6a994e"}
_MARKERS = {FORWARD: "s", HAS_UNFINISHED: "D", GATHER: "o"}
_WRONG, _SHUT = "#b5202c", "#f3d9dc"


def plot_collectives(fixture: Fixture, path: str = "") -> Figure:
    """Ranks as lanes over time, and in them the collectives; the first wrong one is marked.

    Args:
        fixture: of kind dp.
        path: of its file, for messages.

    Returns:
        A figure. Of long traces it shows what is around the first mistake, or the end.

    Raises:
        FixtureError: as `read_group`.
    """
    group = read_group(fixture, path)
    mistake = find_mistake(group)
    longest = max((len(lane) for lane in group.lanes.values()), default=0)
    centre = longest if mistake is None else mistake.place
    start = max(0, min(centre - _MOST_DRAWN // 2, longest - _MOST_DRAWN))
    figure = Figure(figsize=(10, 1.6 + 0.5 * max(1, len(group.lanes))), layout="constrained")
    ax = figure.subplots()
    for lane in group.lanes.values():
        _draw_lane(ax, lane[start : start + _MOST_DRAWN])
    if mistake is not None:
        wrong = group.lanes[mistake.rank][mistake.place]
        ax.plot(wrong.time_ms, wrong.rank, "o", ms=17, mfc="none", mec=_WRONG, mew=2)
        ax.set_title(mistake.message, color=_WRONG, fontsize="small", wrap=True)
    ranks = sorted(group.lanes)
    ax.set(xlabel="time, ms", yticks=ranks, yticklabels=[f"rank {rank}" for rank in ranks])
    ax.set_ylim(max(ranks, default=0) + 0.6, min(ranks, default=0) - 0.6)
    handles = [
        Line2D([], [], marker=_MARKERS[name], color=_COLORS[name], ls="", label=name.replace("_", " "))
        for name in NAMES
    ]
    handles.append(Line2D([], [], color=_SHUT, lw=8, label="gate shut"))
    figure.legend(handles=handles, fontsize="x-small", ncols=4, loc="outside lower center")
    return figure


def _draw_lane(ax: Any, lane: Sequence[Entry]) -> None:
    if not lane:
        return
    rank = lane[0].rank
    ax.plot([lane[0].time_ms, lane[-1].time_ms], [rank, rank], color="#d0d5da", lw=1, zorder=1)
    gathers = [entry for entry in lane if entry.name == GATHER]
    ends = [entry.time_ms for entry in gathers[1:]] + [lane[-1].time_ms]
    for entry, end in zip(gathers, ends, strict=True):
        if entry.is_open is False:
            begin = entry.time_ms if entry.left_ms is None else entry.left_ms
            ax.plot([begin, end], [rank, rank], color=_SHUT, lw=14, solid_capstyle="butt", zorder=0)
    for entry in lane:
        color = _COLORS[entry.name]
        if entry.left_ms is not None:
            ax.plot([entry.time_ms, entry.left_ms], [rank, rank], color=color, lw=4, zorder=2)
    for name in NAMES:
        times = [entry.time_ms for entry in lane if entry.name == name]
        style = {"marker": _MARKERS[name], "color": _COLORS[name], "ls": "", "ms": 5, "zorder": 3}
        ax.plot(times, [rank] * len(times), **style)
