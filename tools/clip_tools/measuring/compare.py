"""`clip-tools compare A B`: what changed between two results, and whether it is more than noise."""

from dataclasses import dataclass
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring.cells import cells_of, has_times, values
from clip_tools.measuring.noise import Change, change
from clip_tools.measuring.tables import table

_SAME_MACHINE = ("cpu", "cores", "memory_gib", "gpu", "device")
_MAY_DIFFER = ("date", "load_before", "packages")


@dataclass(frozen=True)
class Comparison:
    """The changes by quantity, other differences of the two environments, and the cells of only one result."""

    changes: dict[str, Change]
    differences: list[str]
    only_in_one: list[str]

    @property
    def same_machine(self) -> bool:
        """Whether absolute numbers may be compared at all."""
        return not any(line.startswith(_SAME_MACHINE) for line in self.differences)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Two `bench` results: each cell's throughput, and p50 of single images. Raises ToolError for other kinds."""
    cells: list[dict[Any, str]] = []
    for result in (before, after):
        if result["kind"] != "bench":
            raise ToolError(f"expected two results of clip-tools bench, came one of {result['kind']}", exit_code=2)
        cells.append(
            {one: f"{one.arm}, {one.images}, batch {one.batch}, {one.concurrency} at once" for one in cells_of(result)}
        )
    changes = {}
    for cell, name in cells[0].items():
        if cell in cells[1]:
            changes[f"{name}, images/s"] = change(values(before, cell), values(after, cell))
            if (cell.batch, cell.concurrency) == (1, 1) and has_times(before, cell) and has_times(after, cell):
                times = (values(before, cell, "p50_ms"), values(after, cell, "p50_ms"))
                changes[f"{name}, p50 ms"] = change(*times, more_is_better=False)
    if not changes:
        raise ToolError("the two results have no measurement in common")
    only = [f"{name} only in {'AB'[i]}" for i in (0, 1) for cell, name in cells[i].items() if cell not in cells[1 - i]]
    environments = [result["environment"] for result in (before, after)]
    unlike = [line for line in _differences("", *environments) if not line.startswith(_MAY_DIFFER)]
    packages = _differences("package ", *(one.get("packages", {}) for one in environments))
    old, new = (result.get("devices", {}) for result in (before, after))
    both = [{arm: found[arm] for arm in old if arm in new} for found in (old, new)]
    return Comparison(changes, unlike + packages + _differences("device of ", *both), only)


def _differences(what: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{what}{key}: {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]


def text(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    row = "{} | {before:.1f} | {after:.1f} | {ratio:.3f} | {p_value:.3f} | {verdict}"
    rows = (row.format(name, **vars(one)) for name, one in comparison.changes.items())
    lines = [table(" | A | B | B / A | p | ", rows)]
    lines += [f"- {line}\n" for line in [*comparison.differences, *comparison.only_in_one]]
    if not comparison.same_machine:
        lines.append("\nThe machines differ: only the ratios within each result can be compared.\n")
    return "".join(lines)
