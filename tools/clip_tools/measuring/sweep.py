"""`clip-tools sweep`: our own search over the ensemble's settings, as a cross-check of Model Analyzer's."""

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring.noise import SMALLEST_CHANGE
from clip_tools.measuring.options import PerfOptions, SweepOptions
from clip_tools.measuring.perf import run_level, write_input
from clip_tools.measuring.results import begin, read
from clip_tools.measuring.services import triton_service
from clip_tools.measuring.variants import Variant, change, committed_variant
from clip_tools.paths import MODELS
from clip_tools.progress import Tell, silent
from clip_tools.repository import ENSEMBLE, read_config, write_config

Axis = tuple[dict[str, int], ...]  # the values of an axis, each as the fields of a Variant that it sets


def _each(name: str, *values: int) -> Axis:
    return tuple({name: value} for value in dict.fromkeys(values))


def _engines(cores: int) -> Axis:
    """Instances and the threads of each, which mean nothing apart; 0 threads are ONNX Runtime's choice: every core."""
    most = min(cores, 4)
    shared = dict.fromkeys([(1, 0), (2, 0), (2, max(1, cores // 2)), (most, max(1, cores // most))])
    return tuple({"engine_instances": instances, "engine_threads": threads} for instances, threads in shared)


_CORES = len(os.sched_getaffinity(0))
AXES: dict[str, Axis] = {
    "preprocess_instances": _each("preprocess_instances", 1, 2, min(_CORES, 4), min(_CORES, 4) + 1, _CORES),
    "engine": _engines(_CORES),
    "max_batch": _each("max_batch", 8, 16, 32, 64),
    "queue_delay_us": _each("queue_delay_us", 0, 500, 2000, 5000),
}


@dataclass(frozen=True)
class Point:
    """One variant's measurement. `p99_ms` is None where perf_analyzer has not settled."""

    variant: Variant
    throughput: float
    p99_ms: float | None


def search(start: Variant, axes: dict[str, Axis], measure: Callable[[Variant], Point]) -> tuple[Variant, list[Point]]:
    """(the best variant, every point measured): varies one axis at a time and keeps its best value for the next.

    A value replaces the best one only if it is better by more than noise. The search ends after a second pass over the
    axes, or a pass that changed nothing. It can miss a gain that needs two changes at once.
    """
    measure = functools.cache(measure)
    points = [best := measure(start)]
    for _ in range(2):
        before = best
        for value in itertools.chain(*axes.values()):
            changed: dict[str, Any] = dict(value)
            points.append(measure(replace(best.variant, **changed)))
            if points[-1].throughput > best.throughput * (1 + SMALLEST_CHANGE):
                best = points[-1]
        if best == before:
            break
    return best.variant, list(dict.fromkeys(points))


def sweep(options: SweepOptions, *, tell: Tell = silent) -> dict[str, Any]:
    """Run the search, or continue an interrupted one: each point is a line of JSON in `log`."""
    result = begin("sweep")
    same = {key: result["environment"][key] for key in ("cpu", "cores", "git_commit")}
    same |= {"images": options.images, "concurrency": options.concurrency, "window_ms": options.window_ms}
    same["config_name"] = options.config_name
    known = read_log(options.log, same)
    input_file = options.log.with_name("sweep-input.json")
    write_input(PerfOptions(images=options.images, models=options.models), input_file)

    def measure(variant: Variant) -> Point:
        tell(f"sweep: {describe(variant)}")
        if variant in known:
            return known[variant]
        with triton_service(variant, options.models) as service:
            asked = PerfOptions(
                url=service.url.removeprefix("grpc://"),
                window_ms=options.window_ms,
                stability_percent=options.stability_percent,
                models=options.models,
            )
            level = run_level(asked, "concurrency", options.concurrency, input_file)
        point = Point(variant, level["throughput"], level["latency_ms"].get("p99"))
        with options.log.open("a") as log:
            log.write(json.dumps({**same, **asdict(point)}) + "\n")
        return point

    start = committed_variant(options.models, options.config_name)
    best, points = search(start, axes_of(options.axes), measure)
    also = read(options.also)["best"] if options.also else ""
    if (rival := variant_of(also, start)) and rival not in {point.variant for point in points}:
        points.append(measure(rival))
    rows = [
        {
            "setting": describe(point.variant) + (" (as committed)" if point.variant == start else ""),
            "throughput": point.throughput,
            "p99_ms": point.p99_ms,
            "concurrency": options.concurrency,
        }
        for point in sorted(points, key=lambda point: -point.throughput)
    ]
    what = {"searched_by": "Our sweep", "model": ENSEMBLE, "images": options.images}
    return {**result, **what, "points": rows, "best": describe(best), "best_variant": asdict(best)}


def read_log(path: Path, same: dict[str, Any]) -> dict[Variant, Point]:
    """The points of earlier runs on the same machine, commit and load, without a truncated last line."""
    points = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            variant = Variant(**row["variant"])
        except (ValueError, KeyError, TypeError):
            continue
        if {key: row.get(key) for key in same} == same:
            points[variant] = Point(variant, row["throughput"], row["p99_ms"])
    return points


def describe(variant: Variant) -> str:
    """A variant in words."""
    return (
        f"preprocess x{variant.preprocess_instances}, engine x{variant.engine_instances}, "
        f"threads {variant.engine_threads or 'default'}, batch limit {variant.max_batch}, "
        f"queue delay {variant.queue_delay_us} us"
    )


def _settings(text: str) -> dict[str, tuple[int, int]]:
    """The instances and the batch limit of each model in Model Analyzer's words for a setting."""
    found = re.findall(r"(\w+) (\d+) instances?, batch limit (\d+)", text)
    return {model: (int(count), int(limit)) for model, count, limit in found}


def variant_of(setting: str, start: Variant) -> Variant | None:
    """Model Analyzer's setting as a variant of ours, so that the sweep can measure it too; None when it is none."""
    found = _settings(setting)
    if not {"preprocess", "clip_onnx"} <= found.keys():
        return None
    (preprocess, one), (engine, other) = found["preprocess"], found["clip_onnx"]
    return replace(start, preprocess_instances=preprocess, engine_instances=engine, max_batch=min(one, other))


def apply(result: dict[str, Any], name: str, models: Path = MODELS) -> list[Path]:
    """Write the best of `sweep` or `profile` as configs/NAME.pbtxt of each model that it changes; what was written.

    Its instances, batching and batch sizes go into the committed configuration; the rest of it stays, and with it how
    many images a request may hold. Nothing is written when the committed configuration is best. Raises ToolError for a
    name that cannot be one.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ToolError(f"--apply {name}: expected lower-case letters, digits and hyphens", exit_code=2)
    by_analyzer = "best_variant" not in result
    if not by_analyzer:
        variants = dict.fromkeys(("preprocess", "clip_onnx"), Variant(**result["best_variant"]))
    else:
        variants = {
            model: Variant(preprocess_instances=count, engine_instances=count, max_batch=limit)
            for model, (count, limit) in _settings(result["best"]).items()
            if not result["best"].startswith("as committed")
        }
    machine, written = result["environment"], []
    for model, variant in variants.items():
        config = read_config(models, model, variant.config_name)
        if by_analyzer:  # its configurations have `dynamic_batching { }`: no preferred sizes, no delay
            config.dynamic_batching.ClearField("preferred_batch_size")
            config.dynamic_batching.ClearField("max_queue_delay_microseconds")
        if change(config, variant):
            comment = (
                f"{model}, the best of `clip-tools {result['kind']}` on {machine['cpu']}, {machine['cores']} cores, "
                f"{machine['date'][:10]}:\n{result['best']}.\nmax_batch_size is what one request may hold."
            )
            written.append(write_config(models, model, config, name, comment=comment))
    return written


def axes_of(names: Sequence[str]) -> dict[str, Axis]:
    """The axes of these names, in this order. Raises ToolError for an unknown name."""
    try:
        return {name: AXES[name] for name in names}
    except KeyError as error:
        raise ToolError(f"--axes {error}: expected some of {', '.join(AXES)}", exit_code=2) from error
