"""The table of measured precisions in docs/precision.md, from the committed results of `clip-tools verify`."""

import json
from pathlib import Path

from clip_tools.measuring.tables import table
from clip_tools.paths import ROOT

RESULTS = ROOT / "docs" / "results" / "precision"


def results_table(folder: Path = RESULTS) -> str:
    """One row for each result: weights, engine, gate, agreement, and whether it passed."""
    row = (
        "{model} | {engine} | {gate} | {agreement[worst_cosine]:.5f} | {agreement[mean_cosine]:.5f} | "
        "{agreement[top1_agreement]:.1%} | {agreement[neighbours_kept]:.1%} | {passed}"
    )
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        engine = found["engine"].removeprefix("clip_ensemble, configuration ")
        gate = found.get("gate_name", found["precision"])
        passed = f"[{'passed' if found['passed'] else 'failed'}](results/precision/{path.name})"
        rows.append(row.format_map(found | {"engine": engine, "gate": gate, "passed": passed}))
    return table(
        "weights | engine | gate | worst cosine | mean cosine | nearest neighbour the same | ties aside |",
        rows,
        align="---",
    )
