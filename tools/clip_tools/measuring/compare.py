"""`clip-tools compare A B`: what changed between two results, and whether it is more than noise."""

from dataclasses import dataclass
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring.noise import Change, change
from clip_tools.measuring.sections import markdown_table
from clip_tools.measuring.targets import Cell, has_times, values

_SAME_MACHINE = ("cpu", "cores", "memory_gib", "gpu", "device")


@dataclass(frozen=True)
class Comparison:
    """The changes by quantity, and what else is unlike in the two environments."""

    changes: dict[str, Change]
    differences: list[str]
    only_in_one: list[str]

    @property
    def same_machine(self) -> bool:
        """Whether absolute numbers may be compared at all."""
        return not any(line.startswith(_SAME_MACHINE) for line in self.differences)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Two `bench` results: each cell's throughput, and p50 of single images. Raises ToolError for other kinds."""
    for result in (before, after):
        if result["kind"] != "bench":
            raise ToolError(f"expected two results of clip-tools bench, came one of {result['kind']}", exit_code=2)
    cells = [_cells(result) for result in (before, after)]
    changes = {}
    for cell in [cell for cell in cells[0] if cell in cells[1]]:
        changes[f"{_name(cell)}, images/s"] = change(values(before, cell), values(after, cell))
        if (cell.batch, cell.concurrency) == (1, 1) and has_times(before, cell) and has_times(after, cell):
            times = (values(before, cell, "p50_ms"), values(after, cell, "p50_ms"))
            changes[f"{_name(cell)}, p50 ms"] = change(*times, more_is_better=False)
    if not changes:
        raise ToolError("the two results have no measurement in common")
    only = [f"{_name(cell)} only in {'AB'[i]}" for i in (0, 1) for cell in cells[i] if cell not in cells[1 - i]]
    devices = [result.get("devices", {}) for result in (before, after)]
    moved = [
        f"device of {arm}: {devices[0][arm]} -> {devices[1][arm]}"
        for arm in devices[0]
        if arm in devices[1] and devices[0][arm] != devices[1][arm]
    ]
    return Comparison(changes, _differences(before["environment"], after["environment"]) + moved, only)


def _cells(result: dict[str, Any]) -> list[Cell]:
    rows = ((row["arm"], row["images"], row["batch"], row["concurrency"]) for row in result["cells"])
    return list(dict.fromkeys(Cell(*row) for row in rows))


def _name(cell: Cell) -> str:
    return f"{cell.arm}, {cell.images}, batch {cell.batch}, {cell.concurrency} at once"


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = []
    for key in dict.fromkeys([*before, *after]):
        if key in ("date", "load_before", "packages") or before.get(key) == after.get(key):
            continue
        lines.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    packages = [result.get("packages", {}) for result in (before, after)]
    for name in dict.fromkeys([*packages[0], *packages[1]]):
        if packages[0].get(name) != packages[1].get(name):
            lines.append(f"package {name}: {packages[0].get(name)} -> {packages[1].get(name)}")
    return lines


def text(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    rows = [
        (name, f"{one.before:.1f}", f"{one.after:.1f}", f"{one.ratio:.3f}", f"{one.p_value:.3f}", one.verdict)
        for name, one in comparison.changes.items()
    ]
    lines = [markdown_table(("", "A", "B", "B / A", "p", ""), rows)]
    lines += [f"- {line}\n" for line in [*comparison.differences, *comparison.only_in_one]]
    if not comparison.same_machine:
        lines.append("\nThe machines differ: only the ratios within each result can be compared.\n")
    return "".join(lines)
