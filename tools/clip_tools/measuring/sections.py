"""Results as Markdown and pictures: one function for each kind but `bench`, which is in `bench_section`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clip_tools.measuring import plots


@dataclass
class Section:
    """A result's part of the document: its Markdown, and its pictures by file name."""

    text: str
    pictures: dict[str, str] = field(default_factory=dict)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers stand at the right from the second column on."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


PERF_COLUMNS = ("mode", "level", "batch", "images/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms")


def perf_row(level: dict[str, Any]) -> tuple[str, ...]:
    """One level as texts, without percentiles where it has not settled."""
    times = ["not settled", "", "", ""]
    if level.get("settled", True):
        times = [f"{level['latency_ms'][p]:.1f}" for p in ("p50", "p90", "p95", "p99")]
    return (level["mode"], f"{level['level']:g}", str(level["batch"]), f"{level['throughput']:.1f}", *times)


def not_settled(levels: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each level at which no three windows of perf_analyzer agreed, with all of them."""
    return [
        f"{level['mode']} {level['level']:g} has not settled; images/s by window: "
        + ", ".join(f"{rate:.1f}" for rate in level["windows"])
        for level in levels
        if not level.get("settled", True)
    ]


def perf_section(name: str, result: dict[str, Any]) -> Section:
    """What perf_analyzer said."""
    rows = [perf_row(level) for level in result["levels"]]
    head = ("perf_analyzer", *PERF_COLUMNS[1:])
    text = f"`{result['model']}`, {result['images']['count']} photographs ({result['images']['name']}).\n\n"
    text += "".join(f"{line}.\n\n" for line in not_settled(result["levels"]))
    commands = "".join(f"    {level['command']}\n" for level in result["levels"])
    picture = plots.latency_against_throughput(result)
    return Section(text + markdown_table(head, rows) + "\n" + commands, {f"{name}.svg": picture})


def serialisation_section(name: str, result: dict[str, Any]) -> Section:
    """Bytes and time of the four ways to send the same images."""
    rows = []
    for cost in result["costs"]:
        times = (cost["encode_ms"], cost["decode_ms"], cost["preprocess_ms"])
        size = f"{cost['sent_bytes'] / 1000:,.0f}"
        rows.append((cost["format"], str(cost["batch"]), size, *(f"{time:.2f}" for time in times)))
    text = (
        f"{result['images']['count']} photographs ({result['images']['name']}), in one process without a server; "
        f"the median of {result['runs']} runs. Preprocessing is paid once whatever the format: by the client with the "
        "first three, by the server with JPEG.\n\n"
    )
    head = ("format", "batch", "KB sent", "encode ms", "decode ms", "preprocess ms")
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for form in dict.fromkeys(cost["format"] for cost in result["costs"]):
        mine = [cost for cost in result["costs"] if cost["format"] == form]
        series[form] = ([cost["batch"] for cost in mine], [cost["sent_bytes"] / cost["batch"] / 1000 for cost in mine])
    picture = plots.bars(
        {form: sizes[-1] for form, (_, sizes) in series.items()}, title="Sent for one image", label="KB"
    )
    return Section(text + markdown_table(head, rows), {f"{name}.svg": picture})


def onnx_section(name: str, result: dict[str, Any]) -> Section:
    """The engine's session, operators and scaling."""
    session = result["session"]
    parts = [
        f"Configuration: {result['config_name'] or 'the default'}. Session created in {session['created_s']:.1f} s "
        f"with {', then '.join(session['providers'])}.\n"
    ]
    rows = [(str(row["batch"]), f"{row['median_ms']:.1f}", f"{row['throughput']:.1f}") for row in result["scaling"]]
    parts.append(markdown_table(("batch", "ms a run", "images/s"), rows))
    x = [row["batch"] for row in result["scaling"]]
    scaling = {"served session": (x, [row["throughput"] for row in result["scaling"]])}
    pictures = {
        f"{name}-batches.svg": plots.lines(
            dict(scaling), title="The engine alone", x_label="batch", y_label="images a second"
        )
    }
    for profile in result["operators"]:
        nodes = ", ".join(f"{count} by {provider}" for provider, count in profile["nodes_by_provider"].items())
        for provider, operators in profile.get("operators_by_provider", {}).items():
            if provider != profile["provider"]:
                nodes += f"; {provider}'s are " + ", ".join(f"{count} {name}" for name, count in operators.items())
        total = sum(profile["by_operator_ms"].values()) or 1.0
        parts.append(
            f"{profile['provider']} at batch {profile['batch']}: {profile['run_ms']:.1f} ms a run, session created in "
            f"{profile['created_s']:.1f} s, nodes: {nodes}."
            + (
                " It runs the graph as one node, so the operators inside cannot be seen.\n"
                if profile["fused"]
                else "\n"
            )
        )
        if not profile["fused"]:
            top = list(profile["by_operator_ms"].items())[:10]
            share = [(operator, f"{time:.2f}", f"{100 * time / total:.0f} %") for operator, time in top]
            parts.append(markdown_table(("operator", "ms a run", "share"), share))
            title = f"Time by operator, {profile['provider']}, batch {profile['batch']}"
            pictures[f"{name}-operators.svg"] = plots.bars(dict(top), title=title, label="ms a run")
    if paired := result.get("beside"):
        served, other = (
            f"`{graph['file']}` ({graph['nodes']} nodes, worst cosine {graph['worst_cosine']:.7f})"
            for graph in paired["graphs"]
        )
        parts.append(
            f"In turn: {served} and {other}; cosines to open_clip over {paired['photographs']} photographs. "
            "Above 1 the first is faster.\n"
        )
        columns = ("provider", "batch", "first, ms", "second, ms", "ratio", "lowest", "highest")
        parts.append(
            markdown_table(
                columns,
                [
                    (
                        row["provider"],
                        str(row["batch"]),
                        *(f"{row[key]:.1f}" for key in ("served_ms", "other_ms")),
                        *(f"{row[key]:.2f}" for key in ("ratio", "ratio_lowest", "ratio_highest")),
                    )
                    for row in paired["times"]
                ],
            )
        )
    return Section("\n".join(parts), pictures)


def tuning_section(name: str, result: dict[str, Any]) -> Section:
    """Model Analyzer's search, or the sweep's."""
    rows = [
        (
            row["setting"],
            f"{row['throughput']:.1f}",
            "not settled" if row["p99_ms"] is None else f"{row['p99_ms']:.0f}",
            str(row["concurrency"]),
        )
        for row in result["points"]
    ]
    found = (
        f"{result['searched_by']} measured {len(result['points'])} settings of `{result['model']}`; the best: "
        f"{result['best']}.\n\n"
    )
    return Section(found + markdown_table(("setting", "images/s", "p99 ms", "concurrency"), rows), {})


def soak_section(name: str, result: dict[str, Any]) -> Section:
    """Mixed traffic over time: what was sent, what came of it, and what grew."""
    options = result["options"]
    verdict = "Nothing was lost and nothing grew." if not result["problems"] else "Failed:"
    problems = "".join(f"- {problem}\n" for problem in result["problems"])
    text = (
        f"{options['minutes']:g} minutes, {options['clients']} clients, {options['bad_share']:.0%} of the calls bad. "
        f"{verdict}\n{problems}\n"
    )
    calls = [
        (row["kind"], *(f"{row[key]:,.0f}" for key in ("calls", "images", "lost", "p50_ms", "p99_ms")))
        for row in result["calls"]
    ]
    text += markdown_table(("call", "calls", "images", "lost", "p50 ms", "p99 ms"), calls) + "\n"
    rises = [
        (row["title"], f"{row['at_half']:,}", f"{row['at_end']:,}", f"{row['rise']:+.2f}", f"{row['bound']:.2f}")
        for row in result["rises"]
        if row["rise"] is not None
    ]
    text += markdown_table(("server and stubs", "at half time", "at the end", "rise", "bound"), rises)
    text += "\nThe rise is Theil and Sen's slope over the second half, times its length.\n"
    points = result["points"]

    def series(key: str) -> tuple[list[float], list[float]]:
        mine = [point for point in points if key in point]
        return [point["at_s"] / 60 for point in mine], [point[key] for point in mine]

    panels = {
        "memory, MiB": {"private": series("private_mib"), "resident": series("resident_mib")},
        "shared memory, MiB": {"mapped": series("shared_mib")},
        "count": {"open files": series("open_files"), "threads": series("threads")},
        "latency, ms": {"p50": series("p50_ms"), "p99": series("p99_ms")},
    }
    title = f"{options['clients']} clients, {options['bad_share']:.0%} bad calls; judged from half time on"
    picture = plots.over_time(panels, title=title, judged_from=points[len(points) // 2]["at_s"] / 60)
    return Section(text, {f"{name}.svg": picture})
