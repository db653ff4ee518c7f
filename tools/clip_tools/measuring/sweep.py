"""`clip-tools sweep`: our own search over the ensemble's settings, as a cross-check of Model Analyzer's."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clip_tools.measuring.fingerprint import fingerprint
from clip_tools.measuring.noise import SMALLEST_CHANGE
from clip_tools.measuring.perf import PerfOptions, run_level, write_input
from clip_tools.measuring.services import TritonService
from clip_tools.measuring.variants import Variant, change, committed_variant
from clip_tools.measuring.workload import VGA
from clip_tools.paths import MODELS, RESULTS
from clip_tools.repository import ENSEMBLE, write_config

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
class SweepOptions:
    """What to search, and how each point is measured: by perf_analyzer, on a server of its own."""

    axes: dict[str, Axis] = field(default_factory=lambda: AXES)
    start: Variant | None = None  # None: the deployment as it is committed
    images: str = VGA
    concurrency: int = 16
    window_ms: int = 5000
    stability_percent: int = 10
    passes: int = 2
    config_name: str | None = None
    also: tuple[Variant, ...] = ()
    models: Path = MODELS
    log: Path = RESULTS / "sweep.jsonl"


@dataclass(frozen=True)
class Point:
    """One variant's measurement. `p99_ms` is None where perf_analyzer has not settled."""

    variant: Variant
    throughput: float
    p99_ms: float | None


Measure = Callable[[Variant], Point]


def search(start: Variant, axes: dict[str, Axis], measure: Measure, *, passes: int = 2) -> tuple[Variant, list[Point]]:
    """(the best variant, every point measured): axis by axis, the others held at the best so far.

    A value has to be better by more than noise to replace the one before, so of equals the first stands. It ends after
    a pass that changed nothing. It can miss what only two changes together give.
    """
    points: dict[Variant, Point] = {}

    def look(variant: Variant) -> Point:
        if variant not in points:
            points[variant] = measure(variant)
        return points[variant]

    best = look(start)
    for _ in range(passes):
        before = best
        for values in axes.values():
            for value in values:
                changed: dict[str, Any] = dict(value)
                point = look(replace(best.variant, **changed))
                if point.throughput > best.throughput * (1 + SMALLEST_CHANGE):
                    best = point
        if best == before:
            break
    return best.variant, list(points.values())


def sweep(options: SweepOptions, *, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run the search, or go on with an interrupted one: each point is kept in `log`, a line of JSON each."""
    environment = asdict(fingerprint())
    same = {key: environment[key] for key in ("cpu", "cores", "git_commit")}
    same |= {"images": options.images, "concurrency": options.concurrency, "window_ms": options.window_ms}
    same["config_name"] = options.config_name
    known = read_log(options.log, same)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    input_file = options.log.with_name("sweep-input.json")
    write_input(PerfOptions(images=options.images, models=options.models), input_file)

    def measure(variant: Variant) -> Point:
        tell(describe(variant))
        if variant in known:
            return known[variant]
        service = TritonService(variant, options.models)
        try:
            asked = PerfOptions(
                url=service.options.grpc_url.removeprefix("grpc://"),
                window_ms=options.window_ms,
                stability_percent=options.stability_percent,
                models=options.models,
            )
            level = run_level(asked, "concurrency", options.concurrency, input_file)
        finally:
            service.stop()
        point = Point(variant, level.throughput, level.latency_ms.get("p99"))
        with options.log.open("a") as log:
            log.write(json.dumps({**same, **asdict(point)}) + "\n")
        return point

    start = options.start or committed_variant(options.models, options.config_name)
    best, points = search(start, options.axes, measure, passes=options.passes)
    points += [measure(variant) for variant in options.also if variant not in {point.variant for point in points}]
    ordered = sorted(points, key=lambda point: -point.throughput)
    rows = [
        {
            "setting": describe(point.variant) + (" (as committed)" if point.variant == start else ""),
            "throughput": point.throughput,
            "p99_ms": point.p99_ms,
            "concurrency": options.concurrency,
        }
        for point in ordered
    ]
    return {
        "kind": "sweep",
        "environment": environment,
        "searched_by": "Our sweep",
        "model": ENSEMBLE,
        "images": options.images,
        "points": rows,
        "best": describe(best),
        "best_variant": asdict(best),
    }


def read_log(path: Path, same: dict[str, Any]) -> dict[Variant, Point]:
    """The points of earlier runs on the same machine, commit and load. A last line that was cut off is left out."""
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
    threads = "default" if variant.engine_threads == 0 else variant.engine_threads
    return (
        f"preprocess x{variant.preprocess_instances}, engine x{variant.engine_instances}, threads {threads}, "
        f"batch limit {variant.max_batch}, queue delay {variant.queue_delay_us} us"
    )


def variant_of(setting: str, start: Variant) -> Variant | None:
    """Model Analyzer's setting as a variant of ours, so that the sweep can measure it too; None when it is none."""
    found = dict(re.findall(r"(preprocess|clip_onnx) (\d+) instance", setting))
    limits = [int(limit) for limit in re.findall(r"batch limit (\d+)", setting)]
    if len(found) != 2 or not limits:
        return None
    return replace(
        start,
        preprocess_instances=int(found["preprocess"]),
        engine_instances=int(found["clip_onnx"]),
        max_batch=min(limits),
    )


def apply(result: dict[str, Any], name: str, models: Path = MODELS) -> list[Path]:
    """Write the best variant as configs/NAME.pbtxt of each model that it changes; what was written."""
    from clip_tools.repository import read_config

    variant = Variant(**result["best_variant"])
    where = f"{result['environment']['cpu']}, {result['environment']['cores']} cores"
    written = []
    for model in ("preprocess", "clip_onnx", ENSEMBLE):
        config = read_config(models, model, variant.config_name)
        if change(config, variant):
            comment = f"{model} as the sweep found it best on {where}, {result['environment']['date'][:10]}:\n"
            comment += f"{result['best']}.\nmax_batch_size is what one request may hold."
            written.append(write_config(models, model, config, name, comment=comment))
    return written


def axes_of(names: Sequence[str]) -> dict[str, Axis]:
    """The axes of these names, in their order. Raises KeyError for one that is none."""
    return {name: AXES[name] for name in names}
