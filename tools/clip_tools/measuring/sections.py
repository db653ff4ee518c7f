"""Results as Markdown and pictures: a function for each kind. `bench`, `preprocess` and `libraries` are elsewhere."""

from typing import Any

from clip_tools.measuring import plots
from clip_tools.measuring.tables import Section, table

_SHOWN_LAYERS = 12  # in the table; all are in the JSON
_SHOWN_OPERATORS = 10


def not_settled(level: dict[str, Any]) -> str:
    """The windows of a level of which no three agreed; "" for a level that settled."""
    if level.get("settled", True):
        return ""
    windows = ", ".join(f"{rate:.1f}" for rate in level["windows"])
    return f"{level['mode']} {level['level']:g} has not settled; images/s by window: {windows}"


def perf_section(name: str, result: dict[str, Any]) -> Section:
    """What perf_analyzer said."""
    levels = result["levels"]
    row = "{mode} | {level:g} | {batch} | {throughput:.1f} | "
    times = "{p50:.1f} | {p90:.1f} | {p95:.1f} | {p99:.1f}"
    rows = [
        row.format_map(level)
        + ("not settled |  |  | " if not_settled(level) else times.format_map(level["latency_ms"]))
        for level in levels
    ]
    text = (
        f"`{result['model']}`, {result['images']['count']} photographs ({result['images']['name']}).\n\n"
        + "".join(f"{note}.\n\n" for note in filter(None, map(not_settled, levels)))
        + table("perf_analyzer | level | batch | images/s | p50 ms | p90 ms | p95 ms | p99 ms", rows)
        + "\n"
        + "".join(f"    {level['command']}\n" for level in levels)
    )
    return Section(text, {f"{name}.svg": plots.latency_against_throughput(result)})


def serialisation_section(name: str, result: dict[str, Any]) -> Section:
    """Bytes and time of the four ways to send the same images."""
    costs = [cost | {"kb": cost["sent_bytes"] / 1000} for cost in result["costs"]]
    row = "{format} | {batch} | {kb:,.0f} | {encode_ms:.2f} | {decode_ms:.2f} | {preprocess_ms:.2f}"
    text = (
        f"{result['images']['count']} photographs ({result['images']['name']}), in one process without a server; "
        f"the median of {result['runs']} runs. Preprocessing is paid once whatever the format: by the client with the "
        "first three, by the server with JPEG.\n\n"
    ) + table("format | batch | KB sent | encode ms | decode ms | preprocess ms", map(row.format_map, costs))
    sizes = {cost["format"]: cost["kb"] / cost["batch"] for cost in costs}  # the last batch's
    return Section(text, {f"{name}.svg": plots.bars(sizes, title="Sent for one image", label="KB")})


def onnx_section(name: str, result: dict[str, Any]) -> Section:
    """The engine's session, operators and scaling."""
    session, scaling = result["session"], result["scaling"]
    row = "{batch} | {median_ms:.1f} | {throughput:.1f}"
    parts = [
        f"Configuration: {result['config_name'] or 'the default'}. Session created in {session['created_s']:.1f} s "
        f"with {', then '.join(session['providers'])}.\n",
        table("batch | ms a run | images/s", map(row.format_map, scaling)),
    ]
    served = [row["batch"] for row in scaling], [row["throughput"] for row in scaling]
    picture = plots.lines(
        {"served session": served}, title="The engine alone", x_label="batch", y_label="images a second"
    )
    pictures = {f"{name}-batches.svg": picture}
    for profile in result["operators"]:
        provider, times = profile["provider"], profile["by_operator_ms"]
        nodes = ", ".join(f"{count} by {other}" for other, count in profile["nodes_by_provider"].items())
        for other, operators in profile.get("operators_by_provider", {}).items():
            if other != provider:
                nodes += f"; {other}'s are " + ", ".join(f"{count} {kind}" for kind, count in operators.items())
        fused = " It runs the graph as one node, so the operators inside cannot be seen." if profile["fused"] else ""
        parts.append(
            f"{provider} at batch {profile['batch']}: {profile['run_ms']:.1f} ms a run, session created in "
            f"{profile['created_s']:.1f} s, nodes: {nodes}.{fused}\n"
        )
        if not fused:
            top, total = dict(list(times.items())[:_SHOWN_OPERATORS]), sum(times.values()) or 1.0
            rows = (f"{kind} | {ms:.2f} | {100 * ms / total:.0f} %" for kind, ms in top.items())
            parts.append(table("operator | ms a run | share", rows))
            title = f"Time by operator, {provider}, batch {profile['batch']}"
            pictures[f"{name}-operators.svg"] = plots.bars(top, title=title, label="ms a run")
    if paired := result.get("beside"):
        graph = "`{file}` ({nodes} nodes, worst cosine {worst_cosine:.7f})"
        row = "{provider} | {batch} | {served_ms:.1f} | {other_ms:.1f} | {ratio:.2f} | {ratio_lowest:.2f} | "
        row += "{ratio_highest:.2f}"
        parts += [
            f"In turn: {' and '.join(map(graph.format_map, paired['graphs']))}; cosines to open_clip over "
            f"{paired['photographs']} photographs. Above 1 the first is faster.\n",
            table(
                "provider | batch | first, ms | second, ms | ratio | lowest | highest",
                map(row.format_map, paired["times"]),
            ),
        ]
    return Section("\n".join(parts), pictures)


def tuning_section(_: str, result: dict[str, Any]) -> Section:
    """Model Analyzer's search, or the sweep's."""
    points = result["points"]
    rows = (
        f"{point['setting']} | {point['throughput']:.1f} | "
        f"{'not settled' if point['p99_ms'] is None else format(point['p99_ms'], '.0f')} | {point['concurrency']}"
        for point in points
    )
    text = (
        f"{result['searched_by']} measured {len(points)} settings of `{result['model']}`; the best: {result['best']}."
    )
    return Section(f"{text}\n\n" + table("setting | images/s | p99 ms | concurrency", rows))


def soak_section(name: str, result: dict[str, Any]) -> Section:
    """Mixed traffic over time: what was sent, what came of it, and what grew."""
    options, points = result["options"], result["points"]
    verdict = "Nothing was lost and nothing grew." if not result["problems"] else "Failed:"
    problems = "".join(f"- {problem}\n" for problem in result["problems"])
    call = "{kind} | {calls:,.0f} | {images:,.0f} | {lost:,.0f} | {p50_ms:,.0f} | {p99_ms:,.0f}"
    rise = "{title} | {at_half:,} | {at_end:,} | {rise:+.2f} | {bound:.2f}"
    judged = [one for one in result["rises"] if one["rise"] is not None]
    parts = (
        f"{options['minutes']:g} minutes, {options['clients']} clients, {options['bad_share']:.0%} of the calls "
        f"bad. {verdict}\n{problems}",
        table("call | calls | images | lost | p50 ms | p99 ms", map(call.format_map, result["calls"])),
        table("server and stubs | at half time | at the end | rise | bound", map(rise.format_map, judged)),
        "The rise is Theil and Sen's slope over the second half, times its length.\n",
    )

    def series(key: str) -> plots.Line:
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
    return Section("\n".join(parts), {f"{name}.svg": picture})


def precision_section(name: str, result: dict[str, Any]) -> Section:
    """Each mix of `tune-precision`, the layers that BF16 hurts most, and what came of it."""
    count, gate, mixes = len(result["layers"]), result["gate"], result["mixes"]
    inside = [mix for mix in mixes if mix["agreement"]["worst_cosine"] >= gate["worst_cosine"]]
    if best := next((mix for mix in inside if mix["best"]), None):
        verdict = f"The best has {best['lowered']} of {count} layers in BF16 and is {best['ratio']:.2f} times FP32."
    else:
        fastest = max(mix["ratio"] for mix in inside)
        verdict = f"No mix inside the gate is {gate['worth']:g} times FP32; the fastest is {fastest:.2f} times."
    row = (
        f"{{lowered}} of {count} | {{parts}} | {{agreement[worst_cosine]:.5f}} | {{agreement[mean_cosine]:.5f}} | "
        "{agreement[top1_agreement]:.1%} | {ratio:.2f} ({ratio_lowest:.2f} to {ratio_highest:.2f}) | "
        "{images_per_s:.1f} | {passes}"
    )
    judged = [mix | {"passes": "best" if mix["best"] else "passed" if mix in inside else "under"} for mix in mixes]
    costly = sorted(result["layers"], key=lambda layer: -layer["cost"])[:_SHOWN_LAYERS]
    layer = "{name} | {cost:.1e} | {fp32_ms:.1f} | {bf16_ms:.1f}"
    text = (
        f"{result['weights']['model']}, {result['photographs']['count']} photographs, batch {result['batch']}; the "
        f"gate: worst cosine >= {gate['worst_cosine']:g} to open_clip in FP32. {verdict}\n\n"
        + (f"This counts for nothing: {result['counts_for_nothing']}.\n\n" if result["counts_for_nothing"] else "")
        + table(
            "layers in BF16 | parts | worst cosine | mean | nearest unchanged | times FP32 | images/s | gate",
            map(row.format_map, judged),
        )
        + f"\nThe {len(costly)} layers that BF16 hurts most, each alone in BF16 on the photographs that BF16 "
        "throughout hurts most; the times are of the layer alone:\n\n"
        + table("layer | 1 - worst cosine | FP32 ms | BF16 ms", map(layer.format_map, costly))
    )
    return Section(text, {f"{name}.svg": plots.speed_against_fidelity(result)})
