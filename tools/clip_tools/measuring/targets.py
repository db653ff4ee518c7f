"""What the project promises of its speed, as ratios measured side by side in one run; `clip-tools bench --check`."""

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clip_tools.measuring.bare import throughput_bound
from clip_tools.measuring.noise import Ratio, paired_ratio
from clip_tools.measuring.workload import PHONE, VGA

BF16_CONFIG = "cpu-bf16"
FAST_CONFIG = "fast"
BUSY = 16  # requests at once, where the targets say nothing else
SOAK_FIRST, SOAK_LAST = 1_000, 20_000


@dataclass(frozen=True)
class Cell:
    """One thing to measure: an arm's name, the images, images a request, requests in flight."""

    arm: str
    images: str = VGA
    batch: int = 1
    concurrency: int = 1


class NotMeasured(Exception):
    """The result does not hold what a target needs; says what is missing."""


@dataclass(frozen=True)
class Target:
    """One promise. `cells` are what a run has to measure for it; `ratio` reads it off a result.

    Args:
        wanted: the ratio promised: at least, or at most where `at_most`.
        beyond_noise: missed only when every round misses it, for a promise that something does not get worse.
    """

    key: str
    title: str
    wanted: float
    cells: tuple[Cell, ...]
    ratio: Callable[[dict[str, Any]], Ratio]
    at_most: bool = False
    beyond_noise: bool = False

    def is_met(self, ratio: Ratio) -> bool:
        """Whether a measured ratio keeps the promise."""
        if self.at_most:
            return (ratio.lowest if self.beyond_noise else ratio.median) <= self.wanted
        return (ratio.highest if self.beyond_noise else ratio.median) >= self.wanted

    @property
    def wanted_text(self) -> str:
        """The promise in a few characters."""
        return f"{'<=' if self.at_most else '>='} {self.wanted:g}" + (", or within noise" if self.beyond_noise else "")


@dataclass(frozen=True)
class Verdict:
    """What became of a target. `ratio` is None when it was not measured, and `reason` then says why.

    `devices` names them where the arms did not compute on the same: such a ratio keeps no promise.
    """

    target: Target
    ratio: Ratio | None
    reason: str = ""
    devices: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it was measured and met."""
        return self.ratio is not None and not self.devices and self.target.is_met(self.ratio)


def rows_of(result: dict[str, Any], cell: Cell) -> list[dict[str, Any]]:
    """What was measured of a cell, in each round."""
    return [row for row in result["cells"] if all(row[key] == value for key, value in asdict(cell).items())]


def has_times(result: dict[str, Any], cell: Cell) -> bool:
    """Whether its latencies are known: they are not where perf_analyzer never settled."""
    return any(row["p50_ms"] is not None for row in rows_of(result, cell))


def values(result: dict[str, Any], cell: Cell, key: str = "throughput") -> list[float]:
    """A cell's figure in each round. Raises NotMeasured when it has none."""
    found = [float(row[key]) for row in rows_of(result, cell) if row[key] is not None]
    if not found:
        raise NotMeasured(f"{cell.arm} with {cell.images} at batch {cell.batch}, concurrency {cell.concurrency}")
    return found


def across_devices(result: dict[str, Any], arms: Sequence[str]) -> str:
    """ "GPU against CPU" where the arms do not compute on one device, in their order; empty where they do."""
    devices = dict.fromkeys(result["devices"][arm] for arm in arms if arm in result.get("devices", {}))
    return " against ".join(devices) if len(devices) > 1 else ""


def _throughput_ratio(one: Cell, other: Cell) -> tuple[tuple[Cell, Cell], Callable[[dict[str, Any]], Ratio]]:
    return (one, other), lambda result: paired_ratio(values(result, one), values(result, other))


def _bounds(result: dict[str, Any]) -> list[float]:
    if not result.get("bare"):
        raise NotMeasured("the engine and preprocess alone")
    return [
        throughput_bound(
            row["preprocess_s"], min(row["engine_s"].values()), row["cores"], on_gpu=row.get("on_gpu", False)
        )
        for row in result["bare"]
    ]


def _against_bound(result: dict[str, Any]) -> Ratio:
    return paired_ratio(values(result, BUSIEST), _bounds(result))


def _against_bare_single(result: dict[str, Any]) -> Ratio:
    if not result.get("bare"):
        raise NotMeasured("the engine and preprocess alone")
    bare_ms = [statistics.median(row["single_ms"]) for row in result["bare"]]
    return paired_ratio(values(result, _SINGLE, "p50_ms"), bare_ms)


def _instances(kind: str) -> tuple[tuple[Cell, ...], Callable[[dict[str, Any]], Ratio]]:
    """The worst step from n to n + 1 instances. Four at most: beyond, a run would take hours and gain nothing."""
    counts = range(1, min(len(os.sched_getaffinity(0)), 4) + 1)
    cells = tuple(Cell(f"{kind}:{count}", concurrency=BUSY) for count in counts)

    def ratio(result: dict[str, Any]) -> Ratio:
        arms = {row["arm"] for row in result["cells"] if row["arm"].startswith(f"{kind}:")}
        measured = [Cell(arm, concurrency=BUSY) for arm in sorted(arms, key=lambda arm: int(arm.split(":")[1]))]
        steps = [
            paired_ratio(values(result, more), values(result, fewer)) for fewer, more in itertools.pairwise(measured)
        ]
        if not steps:
            raise NotMeasured(f"{kind} with more than one instance")
        return min(steps, key=lambda step: step.median)

    return cells, ratio


def _memory(result: dict[str, Any]) -> Ratio:
    series = {point["requests"]: point["memory_mib"] for point in (result.get("soak") or [])}
    if SOAK_FIRST not in series or SOAK_LAST not in series:
        raise NotMeasured(f"memory after {SOAK_FIRST} and {SOAK_LAST} requests (bench --soak {SOAK_LAST})")
    return paired_ratio([series[SOAK_LAST]], [series[SOAK_FIRST]])


BUSIEST, _SINGLE = Cell("ensemble-grpc", concurrency=BUSY), Cell("ensemble-grpc")
_BF16 = Cell(f"ensemble-grpc@{BF16_CONFIG}", concurrency=BUSY)
_PYTORCH = Cell("pytorch", concurrency=BUSY)
_PHONE_EXACT, _PHONE_FAST = (Cell(f"preprocess{at}", PHONE, concurrency=4) for at in ("", f"@{FAST_CONFIG}"))

# The one home of the table of targets. At concurrency 16 unless it says otherwise.
TARGETS = (
    Target(
        "pytorch", "ensemble over gRPC against the PyTorch service, FP32", 3.3, *_throughput_ratio(BUSIEST, _PYTORCH)
    ),
    Target("pytorch-bf16", "the same, BF16 against the service's FP32", 6.0, *_throughput_ratio(_BF16, _PYTORCH)),
    Target(
        "bound", "the same in FP32, against the bound of engine and preprocess alone", 0.92, (BUSIEST,), _against_bound
    ),
    Target(  # 1.56 on one core: the exact mode has less to win
        "fast", "12 MP photographs: preprocess `fast` against exact", 1.4, *_throughput_ratio(_PHONE_FAST, _PHONE_EXACT)
    ),
    Target(
        "single",
        "single image p50, against preprocess and engine bare",
        1.2,
        (_SINGLE,),
        _against_bare_single,
        at_most=True,
    ),
    Target(
        "client",
        "the Python client against perf_analyzer, same server",
        0.95,
        *_throughput_ratio(BUSIEST, Cell("perf-analyzer", concurrency=BUSY)),
    ),
    Target(
        "instances", "one preprocess instance more, the step alone", 1.0, *_instances("preprocess"), beyond_noise=True
    ),
    Target(
        "instances-ensemble",
        "one preprocess instance more, the whole ensemble",
        1.0,
        *_instances("ensemble-grpc"),
        beyond_noise=True,
    ),
    Target("memory", "resident memory after 20,000 requests against 1,000", 1.05, (), _memory, at_most=True),
)


def check(result: dict[str, Any], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """What became of each target in a result of `clip-tools bench`."""
    verdicts = []
    for target in targets:
        try:
            for row in (row for cell in target.cells for row in rows_of(result, cell) if "not_settled" in row):
                raise NotMeasured(f"{row['arm']}, {row['not_settled']}")
            across = across_devices(result, [cell.arm for cell in target.cells])
            verdicts.append(Verdict(target, target.ratio(result), devices=across))
        except NotMeasured as missing:
            verdicts.append(Verdict(target, None, f"not measured: {missing}"))
        except ValueError as error:
            verdicts.append(Verdict(target, None, f"rounds are missing: {error}"))
    return verdicts
