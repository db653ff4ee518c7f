"""The speed that the project promises, as ratios measured side by side in one run; `clip-tools bench --check`."""

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clip_tools.measuring.cells import Cell, NotMeasured, Result, across_devices, cells_of, rows_of, values
from clip_tools.measuring.noise import Ratio, paired_ratio
from clip_tools.measuring.options import PHONE
from clip_tools.measuring.tables import table

BUSY = 16  # requests at once, where a target says nothing else
SOAK_FIRST, SOAK_LAST = 1_000, 20_000


def _first_against_second(result: Result, cells: Sequence[Cell]) -> Ratio:
    return paired_ratio(values(result, cells[0]), values(result, cells[1]))


@dataclass(frozen=True)
class Target:
    """One promise: `cells` are what a run has to measure for it, and `ratio` reads it off a result.

    The ratio has to be at least `wanted`, or with `at_most` no more. `beyond_noise`: it is missed only when every round
    misses it, for a promise that something does not get worse.
    """

    key: str
    title: str
    wanted: float
    cells: tuple[Cell, ...]
    ratio: Callable[[Result, tuple[Cell, ...]], Ratio] = _first_against_second
    at_most: bool = False
    beyond_noise: bool = False

    def is_met(self, ratio: Ratio) -> bool:
        """Whether a measured ratio keeps the promise."""
        if self.at_most:
            return ratio.median <= self.wanted
        return (ratio.highest if self.beyond_noise else ratio.median) >= self.wanted


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


def verdicts_text(verdicts: Sequence[Verdict]) -> str:
    """A table of the targets with their figures."""
    rows = []
    for one in verdicts:
        wanted = f"{'<=' if one.target.at_most else '>='} {one.target.wanted:g}"
        wanted += ", or within noise" if one.target.beyond_noise else ""
        figure = str(one.ratio or one.reason) + (f"; {one.devices}: not one device" if one.devices else "")
        state = "met" if one.is_met else "missed" if one.ratio else "open"
        rows.append(f"{one.target.title} | {wanted} | {figure} | {state}")
    return table("target | wanted | median of the rounds (lowest to highest) | ", rows)


def throughput_bound(preprocess_s: float, engine_s: float, cores: int, *, on_gpu: bool = False) -> float:
    """The images a second that no server of these two steps can pass on these cores.

    An image costs `preprocess_s` of one core and `engine_s` of all of them, for the engine fills every core while it
    runs: cores / (preprocess core-seconds + engine core-seconds). On a GPU it takes none, and the slower step decides.
    """
    if on_gpu:
        return min(cores / preprocess_s, 1 / engine_s)
    return cores / (preprocess_s + engine_s * cores)


def _bare(result: Result) -> list[dict[str, Any]]:
    if not result.get("bare"):
        raise NotMeasured("the engine and preprocess alone")
    rows: list[dict[str, Any]] = result["bare"]
    return rows


def _against_bound(result: Result, cells: Sequence[Cell]) -> Ratio:
    bounds = [
        throughput_bound(
            row["preprocess_s"], min(row["engine_s"].values()), row["cores"], on_gpu=row.get("on_gpu", False)
        )
        for row in _bare(result)
    ]
    return paired_ratio(values(result, cells[0]), bounds)


def _against_bare_single(result: Result, cells: Sequence[Cell]) -> Ratio:
    bare_ms = [statistics.median(row["single_ms"]) for row in _bare(result)]
    return paired_ratio(values(result, cells[0], "p50_ms"), bare_ms)


def _instances(kind: str) -> tuple[Cell, ...]:
    """The cells of 1 to 4 instances; more would take hours and show nothing new."""
    counts = range(1, min(len(os.sched_getaffinity(0)), 4) + 1)
    return tuple(Cell(f"{kind}:{count}", concurrency=BUSY) for count in counts)


def _worst_step(result: Result, cells: Sequence[Cell]) -> Ratio:
    """The lowest ratio from n to n + 1 instances, of all measured counts."""
    kind = cells[0].arm.partition(":")[0]
    measured = {
        int(cell.arm.partition(":")[2]): values(result, cell)
        for cell in cells_of(result)
        if cell.arm.startswith(f"{kind}:") and cell == Cell(cell.arm, concurrency=BUSY)
    }
    steps = [paired_ratio(measured[more], measured[n]) for n, more in itertools.pairwise(sorted(measured))]
    if not steps:
        raise NotMeasured(f"{kind} with more than one instance")
    return min(steps, key=lambda step: step.median)


def _memory(result: Result, _: Sequence[Cell]) -> Ratio:
    series = {point["requests"]: point["memory_mib"] for point in (result.get("soak") or [])}
    if SOAK_FIRST not in series or SOAK_LAST not in series:
        raise NotMeasured(f"memory after {SOAK_FIRST} and {SOAK_LAST} requests (bench --soak {SOAK_LAST})")
    return paired_ratio([series[SOAK_LAST]], [series[SOAK_FIRST]])


BUSIEST, _SINGLE = Cell("ensemble-grpc", concurrency=BUSY), Cell("ensemble-grpc")
_BF16, _PYTORCH = Cell("ensemble-grpc@cpu-bf16", concurrency=BUSY), Cell("pytorch", concurrency=BUSY)
_PHONE_EXACT, _PHONE_FAST = (Cell(f"preprocess{at}", PHONE, concurrency=4) for at in ("", "@fast"))
_PERF_ANALYZER = Cell("perf-analyzer", concurrency=BUSY)
_FP32 = "ensemble over gRPC against the PyTorch service, FP32"
_BOUND = "the same in FP32, against the bound of engine and preprocess alone"
_BARE = "single image p50, against preprocess and engine bare"
_STEP, _WHOLE = (f"one preprocess instance more, the {what}" for what in ("step alone", "whole ensemble"))
_GROWTH = "resident memory after 20,000 requests against 1,000"

# At concurrency 16 unless a target says otherwise. `fast` gives 1.56 on one core: the exact mode has less to win there.
TARGETS = (
    Target("pytorch", _FP32, 3.3, (BUSIEST, _PYTORCH)),
    Target("pytorch-bf16", "the same, BF16 against the service's FP32", 6.0, (_BF16, _PYTORCH)),
    Target("bound", _BOUND, 0.92, (BUSIEST,), _against_bound),
    Target("fast", "12 MP photographs: preprocess `fast` against exact", 1.4, (_PHONE_FAST, _PHONE_EXACT)),
    Target("single", _BARE, 1.2, (_SINGLE,), _against_bare_single, at_most=True),
    Target("client", "the Python client against perf_analyzer, same server", 0.95, (BUSIEST, _PERF_ANALYZER)),
    Target("instances", _STEP, 1.0, _instances("preprocess"), _worst_step, beyond_noise=True),
    Target("instances-ensemble", _WHOLE, 1.0, _instances("ensemble-grpc"), _worst_step, beyond_noise=True),
    Target("memory", _GROWTH, 1.05, (), _memory, at_most=True),
)


def check(result: Result, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """What became of each target in a result of `clip-tools bench`."""
    verdicts = []
    for target in targets:
        try:
            for row in (row for cell in target.cells for row in rows_of(result, cell) if "not_settled" in row):
                raise NotMeasured(f"{row['arm']}, {row['not_settled']}")
            across = across_devices(result, [cell.arm for cell in target.cells])
            verdicts.append(Verdict(target, target.ratio(result, target.cells), devices=across))
        except NotMeasured as missing:
            verdicts.append(Verdict(target, None, f"not measured: {missing}"))
        except ValueError as error:
            verdicts.append(Verdict(target, None, f"rounds are missing: {error}"))
    return verdicts
