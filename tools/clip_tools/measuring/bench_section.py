"""The result of `clip-tools bench` as Markdown and pictures."""

import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from clip_tools.measuring import plots
from clip_tools.measuring.cells import Cell, NotMeasured, across_devices, cells_of, has_times, rows_of, values
from clip_tools.measuring.noise import Ratio, paired_ratio
from clip_tools.measuring.steps import STEP_HEAD, step_texts
from clip_tools.measuring.tables import Section, table
from clip_tools.measuring.targets import BUSIEST, check, throughput_bound, verdicts_text

BASELINE = "pytorch"
BASELINES = (BASELINE, "pytorch@fp16")


def bench_section(name: str, result: dict[str, Any]) -> Section:
    """Targets, tables and pictures."""
    pictures = {}
    for key, title in (("batch", "One request at a time"), ("concurrency", "Requests of one image")):
        if picture := _throughput_picture(result, key, title):
            pictures[f"{name}-{key}.svg"] = picture
    counts = ", ".join(
        f"{n}: {i['count']} of {i['mean_size_bytes'] / 1000:.0f} KB" for n, i in result["images"].items()
    )
    untrained = "" if result["weights"]["trained"] else ", untrained weights"
    parts = (
        f"Photographs: {counts}; model {result['weights']['model']}{untrained}. "
        "Every answer was checked against open_clip's own. "
        f"Client and server share the machine. {result['options']['rounds']} rounds of "
        f"{result['options']['seconds']:g} s a measurement, the arms in turn.\n",
        verdicts_text(check(result)),
        _bound_text(result),
        _throughput_table(result),
        _latency_table(result),
        _steps_table(result),
        _starts_table(result),
    )
    return Section("\n".join(filter(None, parts)), pictures)


def headline(result: dict[str, Any]) -> str:
    """The figure for the README: throughput at the most requests at once, with machine, date and command."""
    environment, images = result["environment"], result["options"]["images"]
    cells = [cell for cell in cells_of(result) if cell.images == images and cell.batch == 1]
    most = max(cell.concurrency for cell in cells)
    rows = []
    for cell in cells:
        if cell.concurrency != most or ":" in cell.arm or cell.arm.startswith(("preprocess", "perf-analyzer")):
            continue
        ratio, across = _against(result, cell, BASELINE)
        times = (f"{ratio.median:.2f}" + (f" ({across})" if across else "")) if ratio else ""
        rows.append(f"`{cell.arm}` | {statistics.median(values(result, cell)):.1f} | {times}")
    shown = table(f"{images} JPEGs, {most} requests at once | images/s | times `{BASELINE}`", rows)
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['gpu'] or 'no GPU'}, "
    where += f"{environment['date'][:10]}, `{environment['command']}`"
    return f"{shown}\n{where}; all figures: [docs/benchmarks.md](docs/benchmarks.md).\n"


def _against(result: dict[str, Any], cell: Cell, baseline: str) -> tuple[Ratio | None, str]:
    """(How many times the baseline's throughput in the same rounds, the two devices if they differ).

    The ratio is None for the baseline itself, where it was not measured, and for a step alone, which is not equal work.
    """
    if cell.arm == baseline or cell.arm.startswith("preprocess"):
        return None, ""
    try:
        ratio = paired_ratio(values(result, cell), values(result, replace(cell, arm=baseline)))
    except (NotMeasured, ValueError):
        return None, ""
    return ratio, across_devices(result, [cell.arm, baseline])


def _shape(cell: Cell) -> str:
    return f"batch {cell.batch}" if cell.concurrency == 1 else f"{cell.concurrency} at once"


def _spread(found: Iterable[float]) -> str:
    """Three columns: median, lowest, highest."""
    ordered = sorted(found)
    return f"{statistics.median(ordered):.1f} | {ordered[0]:.1f} | {ordered[-1]:.1f}"


def _throughput_table(result: dict[str, Any]) -> str:
    """Images a second, how many times the baselines in the same rounds, each arm's device, and what the GPU did."""
    cells, devices = cells_of(result), result.get("devices", {})
    baselines = [one for one in BASELINES if one == BASELINE or any(cell.arm == one for cell in cells)]
    has_gpu = any("gpu" in row for row in result["cells"])
    head = ["images/s | images |  | median | lowest | highest", *(f"against {one}" for one in baselines)]
    head += ["device"] * bool(devices) + ["GPU % | GPU MiB"] * has_gpu
    rows = []
    for cell in cells:
        columns = [cell.arm, cell.images, _shape(cell), _spread(values(result, cell))]
        for baseline in baselines:
            ratio, across = _against(result, cell, baseline)
            columns.append(str(ratio or "") + (f", {across}" if across else ""))
        columns += [devices.get(cell.arm, "")] * bool(devices) + [_gpu_texts(result, cell)] * has_gpu
        rows.append(" | ".join(columns))
    notes = [f"\n{row['arm']}, {row['not_settled']}.\n" for row in result["cells"] if "not_settled" in row]
    return table(" | ".join(head), rows) + "".join(notes)


def _gpu_texts(result: dict[str, Any], cell: Cell) -> str:
    """Two columns: the rounds' median GPU utilisation, and the peak of GPU memory, with that of the other servers."""
    samples = [row["gpu"] for row in rows_of(result, cell) if "gpu" in row]
    if not samples:
        return " | "
    utilisation = statistics.median(sample["utilisation_percent"] for sample in samples)
    return f"{utilisation:.0f} | {max(sample['memory_mib'] for sample in samples):,.0f}"


def _latency_table(result: dict[str, Any]) -> str:
    """Milliseconds of a request of one image, one at a time."""
    rows = []
    for cell in cells_of(result):
        if (cell.batch, cell.concurrency) == (1, 1) and has_times(result, cell):
            times = (statistics.median(values(result, cell, f"{p}_ms")) for p in ("p50", "p95", "p99"))
            rows.append(" | ".join([cell.arm, cell.images, *(f"{time:.1f}" for time in times)]))
    if single := [time for row in result.get("bare") or [] for time in row["single_ms"]]:
        rows.append(f"preprocess and engine bare |  | {statistics.median(single):.1f} |  | ")
    return table("one image, ms | images | p50 | p95 | p99", rows)


def _steps_table(result: dict[str, Any]) -> str:
    """Where the time goes on the server, from its own statistics."""
    rows = []
    for cell in cells_of(result):
        if cell.arm.startswith("ensemble-grpc") and (cell.batch, cell.concurrency) != (1, 4):
            steps = [step for row in rows_of(result, cell) for step in row.get("steps", [])]
            rows += [" | ".join((cell.arm, cell.images, _shape(cell), text)) for text in step_texts(steps)]
    return table(f"on the server | images |  | {STEP_HEAD}", rows)


def _starts_table(result: dict[str, Any]) -> str:
    starts: dict[str, list[float]] = {}
    for row in result["cold_start"]:
        starts.setdefault(row["arm"], []).append(row["start_s"])
    rows = (f"{arm} | {_spread(found)}" for arm, found in starts.items())
    return table("cold start, s | median | lowest | highest", rows)


def _bound_text(result: dict[str, Any]) -> str:
    bare = result.get("bare")
    if not bare:
        return ""
    preprocess_ms = 1000 * statistics.median(row["preprocess_s"] for row in bare)
    engine_ms = 1000 * statistics.median(min(row["engine_s"].values()) for row in bare)
    cores, on_gpu = bare[0]["cores"], bare[0].get("on_gpu", False)
    bound = throughput_bound(preprocess_ms / 1000, engine_ms / 1000, cores, on_gpu=on_gpu)
    if on_gpu:
        how = (
            f"one of {cores} cores, the engine alone {engine_ms:.3f} ms on the GPU at its best batch: the slower of "
            f"the two, {bound:.1f}"
        )
    else:
        how = (
            f"one core, the engine alone {engine_ms:.2f} ms on all {cores} at its best batch; "
            f"{cores} cores / ({preprocess_ms:.2f} + {cores} x {engine_ms:.2f}) ms = {bound:.1f}"
        )
    text = f"The bound: preprocess alone takes {preprocess_ms:.2f} ms an image on {how} images/s.\n"
    try:
        rates, busy = (values(result, BUSIEST, key) for key in ("throughput", "server_cores_busy"))
    except NotMeasured:
        return text
    spent_ms = statistics.median(1000 * cores_busy / rate for cores_busy, rate in zip(busy, rates, strict=True))
    return text + (
        f"Served at {statistics.median(rates):.1f} images/s, the server's processes had {statistics.median(busy):.2f} "
        f"of the {cores} cores over the whole run, its warm-up too: some {spent_ms:.0f} ms an image. The rest was the "
        "client's, which shares the cores, and idle.\n"
    )


def _throughput_picture(result: dict[str, Any], key: str, title: str) -> str | None:
    """Throughput by `batch` or `concurrency`, a line an arm with the rounds' band; None when nothing varies."""
    images, other = result["options"]["images"], "concurrency" if key == "batch" else "batch"
    arms: dict[str, list[Cell]] = {}
    for cell in cells_of(result):
        if cell.images == images and getattr(cell, other) == 1 and ":" not in cell.arm and "preprocess" not in cell.arm:
            arms.setdefault(cell.arm, []).append(cell)
    series: dict[str, plots.Line] = {}
    ranges: dict[str, plots.Line] = {}
    for arm, cells in arms.items():
        if len(cells) > 1:
            levels = sorted(getattr(cell, key) for cell in cells)
            found = [values(result, Cell(arm, images, **{key: level})) for level in levels]
            series[arm] = (levels, [statistics.median(each) for each in found])
            ranges[arm] = ([min(each) for each in found], [max(each) for each in found])
    labels = {"x_label": "images a request" if key == "batch" else "requests at once", "y_label": "images a second"}
    return plots.lines(series, title=f"{title}, {images} JPEGs", ranges=ranges, **labels) if series else None
