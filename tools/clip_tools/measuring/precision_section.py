"""The result of `clip-tools tune-precision` as Markdown and pictures."""

from typing import Any

from clip_tools.measuring import plots
from clip_tools.measuring.sections import Section, markdown_table

_SHOWN = 12  # layers in the table; all are in the JSON


def precision_section(name: str, result: dict[str, Any]) -> Section:
    """Each mix that was measured, the layers that BF16 hurts most, and what came of it."""
    count, gate = len(result["layers"]), result["gate"]
    rows = []
    for mix in result["mixes"]:
        found = mix["agreement"]
        ratio = f"{mix['ratio']:.2f} ({mix['ratio_lowest']:.2f} to {mix['ratio_highest']:.2f})"
        passed = "best" if mix["best"] else "passed" if found["worst_cosine"] >= gate["worst_cosine"] else "under"
        rows.append(
            (
                f"{mix['lowered']} of {count}",
                str(mix["parts"]),
                f"{found['worst_cosine']:.5f}",
                f"{found['mean_cosine']:.5f}",
                f"{found['top1_agreement']:.1%}",
                ratio,
                f"{mix['images_per_s']:.1f}",
                passed,
            )
        )
    head = ("layers in BF16", "parts", "worst cosine", "mean", "nearest unchanged", "times FP32", "images/s", "gate")
    costly = sorted(result["layers"], key=lambda layer: -layer["cost"])[:_SHOWN]
    layers = [
        (layer["name"], f"{layer['cost']:.1e}", f"{layer['fp32_ms']:.1f}", f"{layer['bf16_ms']:.1f}")
        for layer in costly
    ]
    text = (
        f"{result['weights']['model']}, {result['photographs']['count']} photographs, batch {result['batch']}; the "
        f"gate: worst cosine >= {gate['worst_cosine']:g} to open_clip in FP32. {_verdict(result)}\n\n"
        + (f"This counts for nothing: {result['counts_for_nothing']}.\n\n" if result["counts_for_nothing"] else "")
        + markdown_table(head, rows)
        + f"\nThe {len(layers)} layers that BF16 hurts most, each alone in BF16 on the photographs that BF16 "
        "throughout hurts most; the times are of the layer alone:\n\n"
        + markdown_table(("layer", "1 - worst cosine", "FP32 ms", "BF16 ms"), layers)
    )
    return Section(text, {f"{name}.svg": plots.speed_against_fidelity(result)})


def _verdict(result: dict[str, Any]) -> str:
    gate = result["gate"]
    inside = [mix for mix in result["mixes"] if mix["agreement"]["worst_cosine"] >= gate["worst_cosine"]]
    best = next((mix for mix in inside if mix["best"]), None)
    if best:
        return (
            f"The best has {best['lowered']} of {len(result['layers'])} layers in BF16 and is {best['ratio']:.2f} "
            "times FP32."
        )
    fastest = max(mix["ratio"] for mix in inside)
    return f"No mix inside the gate is {gate['worth']:g} times FP32; the fastest is {fastest:.2f} times."
