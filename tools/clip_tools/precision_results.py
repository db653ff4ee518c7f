"""The table of measured precisions in docs/precision.md, from the committed results of `clip-tools verify`."""

import json
from pathlib import Path

from clip_tools.paths import ROOT

RESULTS = ROOT / "docs" / "results" / "precision"


def results_table(folder: Path = RESULTS) -> str:
    """One row for each result: weights, engine, gate, agreement, and whether it passed."""
    lines = [
        "| weights | engine | gate | worst cosine | mean cosine | nearest neighbour the same | ties aside | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        agreement = found["agreement"]
        cells = (
            found["model"],
            found["engine"].removeprefix("clip_ensemble, configuration "),
            found.get("gate_name", found["precision"]),
            f"{agreement['worst_cosine']:.5f}",
            f"{agreement['mean_cosine']:.5f}",
            f"{agreement['top1_agreement']:.1%}",
            f"{agreement['neighbours_kept']:.1%}",
            f"[{'passed' if found['passed'] else 'failed'}](results/precision/{path.name})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
