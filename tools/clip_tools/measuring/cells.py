"""What a result of `clip-tools bench` holds: one cell for each arm, size and number of requests, measured in rounds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clip_tools.measuring.options import VGA

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One thing to measure: an arm's name, the images, images a request, requests in flight."""

    arm: str
    images: str = VGA
    batch: int = 1
    concurrency: int = 1


class NotMeasured(Exception):
    """The result lacks a measurement that a target needs; the message names it."""


def cells_of(result: Result) -> list[Cell]:
    """The cells that were measured, each once."""
    keys = ("arm", "images", "batch", "concurrency")
    return list(dict.fromkeys(Cell(*(row[key] for key in keys)) for row in result["cells"]))


def rows_of(result: Result, cell: Cell) -> list[dict[str, Any]]:
    """What was measured of a cell, in each round."""
    return [row for row in result["cells"] if all(row[key] == value for key, value in asdict(cell).items())]


def has_times(result: Result, cell: Cell) -> bool:
    """Whether its latencies are known; perf_analyzer reports none if it never settled."""
    return any(row["p50_ms"] is not None for row in rows_of(result, cell))


def values(result: Result, cell: Cell, key: str = "throughput") -> list[float]:
    """A cell's figure in each round. Raises NotMeasured when it has none."""
    found = [float(row[key]) for row in rows_of(result, cell) if row.get(key) is not None]
    if not found:
        raise NotMeasured(f"{cell.arm} with {cell.images} at batch {cell.batch}, concurrency {cell.concurrency}")
    return found


def across_devices(result: Result, arms: Sequence[str]) -> str:
    """ "GPU against CPU" if the arms, in this order, compute on different devices; else empty."""
    devices = dict.fromkeys(result["devices"][arm] for arm in arms if arm in result.get("devices", {}))
    return " against ".join(devices) if len(devices) > 1 else ""
