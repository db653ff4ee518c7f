"""The pictures of results as SVG. The same numbers give the same text, so that `make lint` can compare it."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clip_tools.errors import needs_extra

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7768ae", "#8d8d8d")
Line = tuple[Sequence[float], Sequence[float]]
"""x and y."""


def new_axes(height: float = 3.6) -> Any:
    """The axes of a new figure, `height` inches high."""
    return _figure(height).add_subplot()


def _figure(height: float) -> Any:
    with needs_extra("server"):
        from matplotlib.figure import Figure
    return Figure(figsize=(7.2, height), layout="constrained")


def _svg(figure: Any) -> str:
    """The figure as SVG without date, version or random ids."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "clip-tools", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE)


def labelled(axes: Any, title: str, x_label: str, y_label: str) -> Any:
    """The figure of the axes, with its title, labels and legend."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    if axes.has_data():
        axes.legend(fontsize=8)
    axes.set_title(title, loc="left", size=10)
    return axes.figure


def _label(axes: Any, text: str, where: tuple[float, float]) -> None:
    axes.annotate(text, where, xytext=(4, 4), textcoords="offset points", size=8)


def latency_against_throughput(result: dict[str, Any]) -> str:
    """perf_analyzer's levels: throughput to the right, p50 and p99 upwards. Levels without percentiles are left out."""
    axes = new_axes()
    for colour, mode in zip(COLOURS, ("concurrency", "request-rate"), strict=False):
        levels = [level for level in result["levels"] if level["mode"] == mode and level.get("settled", True)]
        x = [level["throughput"] for level in levels]
        for name, line in (("p50", "o-"), ("p99", "o:")) if levels else ():
            y = [level["latency_ms"][name] for level in levels]
            axes.plot(x, y, line, color=colour, label=f"{mode}, {name}", markersize=4)
        for level in levels:
            _label(axes, f"{level['level']:g}", (level["throughput"], level["latency_ms"]["p50"]))
    title = f"{result['model']} by perf_analyzer, {result['images']['name']} JPEGs"
    return _svg(labelled(axes, title, "images a second", "latency, ms"))


def lines(
    series: Mapping[str, Line], *, title: str, x_label: str, y_label: str, ranges: Mapping[str, Line] | None = None
) -> str:
    """A line a name, x on a logarithmic scale. `ranges` are the lowest and highest y, drawn as bands."""
    axes = new_axes()
    for index, (name, (x, y)) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(x, y, "o-", color=colour, label=name, markersize=4)
        if ranges:
            axes.fill_between(x, *ranges[name], color=colour, alpha=0.15, linewidth=0)
    ticks = sorted({value for x, _ in series.values() for value in x})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return _svg(labelled(axes, title, x_label, y_label))


def over_time(panels: Mapping[str, Mapping[str, Line]], *, title: str, judged_from: float) -> str:
    """A panel for each label, one below the other: name -> (minutes, values). Gray: what is not judged."""
    figure = _figure(1.4 * len(panels) + 0.6)
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, series) in zip(rows, panels.items(), strict=True):
        for colour, (name, (x, y)) in zip(COLOURS, series.items(), strict=False):
            axes.plot(x, y, "-", color=colour, label=name, linewidth=1.2)
        axes.axvspan(0, judged_from, color="black", alpha=0.05, linewidth=0)
        axes.set_ylabel(label, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, loc="lower right", ncols=len(series))
    rows[0].set_title(title, loc="left", size=10)
    rows[-1].set_xlabel("minutes")
    rows[-1].set_xlim(left=0)
    return _svg(figure)


def speed_against_fidelity(result: dict[str, Any]) -> str:
    """The mixes of `tune-precision`: 1 - worst cosine to the right, speed upwards, BF16 layers at each point."""
    axes, mixes, gate = new_axes(), result["mixes"], result["gate"]
    x = [max(1 - mix["agreement"]["worst_cosine"], 1e-7) for mix in mixes]
    y = [mix["ratio"] for mix in mixes]
    reach = [
        [mix["ratio"] - mix["ratio_lowest"] for mix in mixes],
        [mix["ratio_highest"] - mix["ratio"] for mix in mixes],
    ]
    axes.errorbar(x, y, reach, fmt="o-", color=COLOURS[0], markersize=4, linewidth=1, capsize=2)
    for mix, where in zip(mixes, zip(x, y, strict=True), strict=True):
        _label(axes, str(mix["lowered"]), where)
    allowed = 1 - gate["worst_cosine"]
    axes.axvline(allowed, color=COLOURS[1], linestyle="--", linewidth=1, label=f"gate: {1 - allowed:g}")
    axes.axhline(gate["worth"], color="black", linestyle=":", linewidth=1, label="a quarter over FP32")
    axes.set_xscale("log")
    title = f"{result['weights']['model']}: layers in BF16, of {len(result['layers'])}"
    return _svg(labelled(axes, title, "1 - worst cosine to open_clip in FP32", "times FP32"))


def bars(values: dict[str, float], *, title: str, label: str) -> str:
    """One horizontal bar a name, the largest on top, each with its number."""
    axes = new_axes(1.2 + 0.32 * len(values))
    names = sorted(values, key=lambda name: values[name])
    drawn = axes.barh(names, [values[name] for name in names], color=COLOURS[0])
    axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", size=10)
    return _svg(axes.figure)
