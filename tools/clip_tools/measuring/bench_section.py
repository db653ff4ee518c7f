"""The result of `clip-tools bench` as Markdown and pictures."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clip_tools.measuring import plots
from clip_tools.measuring.bare import throughput_bound
from clip_tools.measuring.noise import Ratio, paired_ratio
from clip_tools.measuring.sections import Section, markdown_table
from clip_tools.measuring.targets import (
    BUSIEST,
    Cell,
    NotMeasured,
    Verdict,
    across_devices,
    check,
    has_times,
    rows_of,
    values,
)

BASELINE = "pytorch"
BASELINES = (BASELINE, "pytorch@fp16")


def verdicts_text(verdicts: Sequence[Verdict]) -> str:
    """Each target with its figure."""
    rows = []
    for verdict in verdicts:
        figure = str(verdict.ratio) if verdict.ratio else verdict.reason
        if verdict.devices:
            figure += f"; {verdict.devices}: not one device"
        state = "met" if verdict.is_met else ("missed" if verdict.ratio else "open")
        rows.append((verdict.target.title, verdict.target.wanted_text, figure, state))
    return markdown_table(("target", "wanted", "median of the rounds (lowest to highest)", ""), rows)


def bench_text(result: dict[str, Any]) -> str:
    """The tables of a `bench` result."""
    parts = [_throughput_table(result), _latency_table(result), _steps_table(result), _starts_table(result)]
    return "\n".join(part for part in parts if part)


def headline(result: dict[str, Any]) -> str:
    """The figure for the README: throughput at the most requests at once, with machine, date and command."""
    environment, images = result["environment"], result["options"]["images"]
    cells = [cell for cell in _cells(result) if cell.images == images and cell.batch == 1]
    most = max(cell.concurrency for cell in cells)
    rows = []
    for cell in cells:
        if cell.concurrency != most or ":" in cell.arm or cell.arm.startswith(("preprocess", "perf-analyzer")):
            continue
        found = values(result, cell)
        ratio = _against(result, cell)
        across = across_devices(result, [cell.arm, BASELINE])
        times = (f"{ratio.median:.2f}" + (f" ({across})" if across else "")) if ratio else ""
        rows.append((f"`{cell.arm}`", f"{statistics.median(found):.1f}", times))
    table = markdown_table((f"{images} JPEGs, {most} requests at once", "images/s", f"times `{BASELINE}`"), rows)
    gpu = environment["gpu"] or "no GPU"
    where = f"{environment['cpu']}, {environment['cores']} cores, {gpu}, {environment['date'][:10]}"
    return f"{table}\n{where}, `{environment['command']}`; all figures: [docs/benchmarks.md](docs/benchmarks.md).\n"


def _against(result: dict[str, Any], cell: Cell, baseline: str = BASELINE) -> Ratio | None:
    """How many times the baseline's throughput in the same rounds; None for the baseline itself, where it was not
    measured, and for a step alone, which is not equal work.
    """
    if cell.arm == baseline or cell.arm.startswith("preprocess"):
        return None
    try:
        return paired_ratio(values(result, cell), values(result, replace(cell, arm=baseline)))
    except (NotMeasured, ValueError):
        return None


def _cells(result: dict[str, Any]) -> list[Cell]:
    keys = ("arm", "images", "batch", "concurrency")
    return list(dict.fromkeys(Cell(*(row[key] for key in keys)) for row in result["cells"]))


def _shape_text(cell: Cell) -> str:
    return f"batch {cell.batch}" if cell.concurrency == 1 else f"{cell.concurrency} at once"


def _throughput_table(result: dict[str, Any]) -> str:
    """Images a second, how many times the baselines in the same rounds, each arm's device, and what the GPU did."""
    cells, devices = _cells(result), result.get("devices", {})
    baselines = [one for one in BASELINES if one == BASELINE or any(cell.arm == one for cell in cells)]
    has_gpu = any("gpu" in row for row in result["cells"])
    head = ("images/s", "images", "", "median", "lowest", "highest", *(f"against {one}" for one in baselines))
    head += (("device",) if devices else ()) + (("GPU %", "GPU MiB") if has_gpu else ())
    rows = []
    for cell in cells:
        found = values(result, cell)
        figures = (statistics.median(found), min(found), max(found))
        row = [cell.arm, cell.images, _shape_text(cell), *(f"{figure:.1f}" for figure in figures)]
        for one in baselines:
            ratio, across = _against(result, cell, one), across_devices(result, [cell.arm, one])
            row.append(str(ratio or "") + (f", {across}" if ratio and across else ""))
        row += [devices.get(cell.arm, "")] if devices else []
        rows.append((*row, *(_gpu_texts(result, cell) if has_gpu else ())))
    notes = [f"\n{row['arm']}, {row['not_settled']}.\n" for row in result["cells"] if "not_settled" in row]
    return markdown_table(head, rows) + "".join(notes)


def _gpu_texts(result: dict[str, Any], cell: Cell) -> tuple[str, str]:
    """The GPU's utilisation, the rounds' median, and the most memory in use on it, that of the other servers too."""
    samples = [row["gpu"] for row in rows_of(result, cell) if "gpu" in row]
    if not samples:
        return "", ""
    utilisation = statistics.median(sample["utilisation_percent"] for sample in samples)
    return f"{utilisation:.0f}", f"{max(sample['memory_mib'] for sample in samples):,.0f}"


def _latency_table(result: dict[str, Any]) -> str:
    """Milliseconds of a request of one image, one at a time."""
    rows = []
    for cell in _cells(result):
        if (cell.batch, cell.concurrency) == (1, 1) and has_times(result, cell):
            times = (statistics.median(values(result, cell, f"{p}_ms")) for p in ("p50", "p95", "p99"))
            rows.append((cell.arm, cell.images, *(f"{time:.1f}" for time in times)))
    for row in [result["bare"]] if result.get("bare") else []:
        single = [time for one in row for time in one["single_ms"]]
        rows.append(("preprocess and engine bare", "", f"{statistics.median(single):.1f}", "", ""))
    return markdown_table(("one image, ms", "images", "p50", "p95", "p99"), rows) if rows else ""


def _steps_table(result: dict[str, Any]) -> str:
    """Where the time goes on the server, from its own statistics."""
    rows = []
    for cell in _cells(result):
        if not cell.arm.startswith("ensemble-grpc") or (cell.batch, cell.concurrency) == (1, 4):
            continue
        found = rows_of(result, cell)
        for model in dict.fromkeys(step["model"] for row in found for step in row.get("steps", [])):
            steps = [step for row in found for step in row["steps"] if step["model"] == model]
            keys = ("batch", "queue_ms", "compute_input_ms", "compute_infer_ms", "compute_output_ms")
            medians = (statistics.median(step[key] for step in steps) for key in keys)
            rows.append((cell.arm, cell.images, _shape_text(cell), model, *(f"{value:.2f}" for value in medians)))
    head = ("on the server", "images", "", "step", "batch", "queue ms", "input ms", "infer ms", "output ms")
    return markdown_table(head, rows) if rows else ""


def _starts_table(result: dict[str, Any]) -> str:
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in result["cold_start"]):
        starts = [row["start_s"] for row in result["cold_start"] if row["arm"] == arm]
        rows.append((arm, f"{statistics.median(starts):.1f}", f"{min(starts):.1f}", f"{max(starts):.1f}"))
    return markdown_table(("cold start, s", "median", "lowest", "highest"), rows) if rows else ""


def _bound_text(result: dict[str, Any]) -> str:
    if not result.get("bare"):
        return ""
    preprocess_ms = 1000 * statistics.median(row["preprocess_s"] for row in result["bare"])
    engine_ms = 1000 * statistics.median(min(row["engine_s"].values()) for row in result["bare"])
    cores = result["bare"][0]["cores"]
    if result["bare"][0].get("on_gpu"):
        bound = throughput_bound(preprocess_ms / 1000, engine_ms / 1000, cores, on_gpu=True)
        return (
            f"The bound: preprocess alone takes {preprocess_ms:.2f} ms an image on one of {cores} cores, the engine "
            f"alone {engine_ms:.3f} ms on the GPU at its best batch: the slower of the two, {bound:.1f} images/s.\n"
            + _served_work_text(result, cores)
        )
    bound = throughput_bound(preprocess_ms / 1000, engine_ms / 1000, cores)
    return (
        f"The bound: preprocess alone takes {preprocess_ms:.2f} ms an image on one core, the engine alone "
        f"{engine_ms:.2f} ms on all {cores} at its best batch; "
        f"{cores} cores / ({preprocess_ms:.2f} + {cores} x {engine_ms:.2f}) ms = {bound:.1f} images/s.\n"
        + _served_work_text(result, cores)
    )


def _served_work_text(result: dict[str, Any], cores: int) -> str:
    """What the server spent where it is held against the bound, which gives all cores to preprocess and engine."""
    try:
        rates, busy = (values(result, BUSIEST, key) for key in ("throughput", "server_cores_busy"))
    except (NotMeasured, KeyError):
        return ""
    spent_ms = statistics.median(1000 * cores_busy / rate for cores_busy, rate in zip(busy, rates, strict=True))
    return (
        f"Served at {statistics.median(rates):.1f} images/s, the server's processes had {statistics.median(busy):.2f} "
        f"of the {cores} cores over the whole run, its warm-up too: some {spent_ms:.0f} ms an image. The rest was the "
        "client's, which shares the cores, and idle.\n"
    )


def _throughput_picture(result: dict[str, Any], key: str, title: str) -> str | None:
    """Throughput by `batch` or `concurrency`, a line an arm with the rounds' band; None when nothing varies."""
    images, other = result["options"]["images"], "concurrency" if key == "batch" else "batch"
    chosen = [c for c in _cells(result) if c.images == images and getattr(c, other) == 1 and ":" not in c.arm]
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    ranges: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for arm in dict.fromkeys(cell.arm for cell in chosen):
        x = sorted(getattr(cell, key) for cell in chosen if cell.arm == arm)
        if len(x) > 1 and not arm.startswith("preprocess"):
            found = [values(result, Cell(arm, images, **{key: level})) for level in x]
            series[arm] = (x, [statistics.median(each) for each in found])
            ranges[arm] = ([min(each) for each in found], [max(each) for each in found])
    if not series:
        return None
    label = "images a request" if key == "batch" else "requests at once"
    return plots.lines(
        series, title=f"{title}, {images} JPEGs", x_label=label, y_label="images a second", ranges=ranges
    )


def bench_section(name: str, result: dict[str, Any]) -> Section:
    """Targets, tables and pictures of a `bench` result."""
    pictures = {}
    for key, title in (("batch", "One request at a time"), ("concurrency", "Requests of one image")):
        if picture := _throughput_picture(result, key, title):
            pictures[f"{name}-{key}.svg"] = picture
    counts = ", ".join(
        f"{n}: {i['count']} of {i['mean_size_bytes'] / 1000:.0f} KB" for n, i in result["images"].items()
    )
    text = (
        f"Photographs: {counts}; model {result['weights']['model']}"
        f"{'' if result['weights']['trained'] else ', untrained weights'}. "
        "Every answer was checked against open_clip's own. "
        f"Client and server share the machine. {result['options']['rounds']} rounds of "
        f"{result['options']['seconds']:g} s a measurement, the arms in turn.\n\n"
        + verdicts_text(check(result))
        + "\n"
        + _bound_text(result)
        + "\n"
        + bench_text(result)
    )
    return Section(text, pictures)
