"""`clip-tools export-onnx --precision`: the graph in a lower precision, written only if it passes its gate."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.accuracy.gates import (
    GATES,
    Agreement,
    Precision,
    agreement,
    counts_for_nothing,
    failures,
    likely_neighbours_kept,
)
from clip_tools.accuracy.reference import image_pixels, reference
from clip_tools.accuracy.sample import write_sample
from clip_tools.errors import ToolError
from clip_tools.export.export_onnx import compare, make_manifest, tensors_of, write_graph
from clip_tools.export.external_data import LARGEST_BYTES, is_large, load_graph, save_graph
from clip_tools.export.manifest import Manifest, put_in_place
from clip_tools.export.onnx_runner import OnnxRun, run_onnx
from clip_tools.export.precision import count_matrices, count_weights, lower
from clip_tools.oracle import Oracle, Weights, load_oracle
from clip_tools.progress import Tell, silent

if TYPE_CHECKING:
    import onnx

# The share of the gate's allowed error that a mix may have on the held-out images; other images, such as the gate's,
# may have more. Chosen before any measurement.
_MARGIN = 0.5
_COMPARED_IN_FP32 = 8  # photographs on which the intermediate FP32 graph is compared with PyTorch


def export_lower_precision(
    weights: Weights,
    precision: Precision,
    photographs: Sequence[Path],
    output: Path,
    *,
    calibration: Sequence[Path] = (),
    tell: Tell = silent,
    largest_bytes: int = LARGEST_BYTES,
) -> Manifest:
    """Write the graph in a lower precision to `output`, with manifest and sample. Raises ToolError if its gate fails.

    The gate compares the embeddings of `photographs` with open_clip's, and counts with at least `gates.MIN_IMAGES` of
    them. INT8 and FP8 need the images of `calibration`.
    """
    import onnx

    oracle = load_oracle(weights)
    if precision in ("int8", "fp8") and is_large(oracle.model.visual.parameters(), largest_bytes):
        raise ToolError(
            f"--precision {precision}: {weights.model} has over {largest_bytes / 1e9:.1f} GB of weights in FP32, too "
            "many to calibrate: expected fp16 or bf16",
            exit_code=2,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        draft = Path(folder) / output.name
        full = _fp32_graph(oracle, photographs, Path(folder), largest_bytes)
        graph, calibrated = _in_precision(full, precision, oracle, calibration, tell)
        del full
        matrices = count_matrices(graph)
        save_graph(graph, draft, largest_bytes)
        onnx.checker.check_model(str(draft), full_check=True)
        expected = reference(weights, photographs, oracle=oracle)
        run: OnnxRun = run_onnx(draft, expected.pixels, tell=tell, what="comparing with open_clip")
        found = agreement(run.embeddings, expected.embeddings, expected.names)
        trained = weights.seed is None
        if under := failures(found, GATES[precision], trained=trained):
            mix = f", {calibrated['layers']} of {calibrated['of_layers']} layers," if calibrated else ""
            raise ToolError(
                f"the {precision} graph of {weights.model}{mix} fails its gate on {found.images} photographs: "
                f"{'; '.join(under)}; nothing was written"
            )
        manifest = make_manifest(
            draft,
            weights,
            precision,
            found.worst_cosine,
            found.max_abs,
            opset=graph.opset_import[0].version,
            tensors=tensors_of(draft),
            fit=dict(oracle.fit),
            matrices=matrices,
            gate={
                **asdict(found),
                "how": run.how,
                "images_sha256": expected.images_sha256,
                "counts_for_nothing": counts_for_nothing(found.images, trained=trained),
            },
            calibration=calibrated,
        )
        put_in_place(draft, manifest, output)
    write_sample(output, weights, (photograph.read_bytes() for photograph in photographs), oracle)
    return manifest


def _fp32_graph(oracle: Oracle, photographs: Sequence[Path], folder: Path, largest_bytes: int) -> "onnx.ModelProto":
    """The FP32 graph in the form for GPUs, compared with PyTorch."""
    path = folder / "fp32.onnx"
    write_graph(oracle, path, "gpu", largest_bytes=largest_bytes)
    compare(oracle, path, [photograph.read_bytes() for photograph in photographs[:_COMPARED_IN_FP32]])
    return load_graph(path)


def _in_precision(
    full: "onnx.ModelProto", precision: Precision, oracle: Oracle, images: Sequence[Path], tell: Tell
) -> "tuple[onnx.ModelProto, dict[str, Any]]":
    """(The graph in that precision, the manifest's entry on its calibration).

    An eight-bit graph has as many eight-bit layers as pass the gate with a margin on the held-out images, and at least
    half of its weights in them; the rest is FP16. The gate then decides whether that is accurate enough.
    """
    if precision in ("fp16", "bf16"):
        return lower(full, precision), {}
    if precision not in ("int8", "fp8"):
        raise ToolError(f"--precision {precision}: expected a lower precision than FP32", exit_code=2)
    import numpy as np

    from clip_tools.quantization.calibration import calibrate, split
    from clip_tools.quantization.quantize import prepare, quantize

    prepared = prepare(full, precision)
    seen, held_out = split(image_pixels(oracle, images))
    calibration = calibrate(prepared, seen, held_out, precision, tell=tell)
    exact = run_onnx(prepared, np.concatenate([seen, held_out])).embeddings
    weights = count_weights(prepared)
    mixes = calibration.mixes(weights)
    first, last = 0, len(mixes) - 1  # bisects for the first mix that passes, or the last one
    while first < last:
        middle = (first + last) // 2
        got, expected = run_onnx(quantize(prepared, mixes[middle], precision), held_out).embeddings, exact[len(seen) :]
        found = replace(agreement(got, expected), neighbours_kept=likely_neighbours_kept(got, expected, exact))
        first, last = (first, middle) if holds_with_margin(found, precision) else (middle + 1, last)
        tell("choosing the layers", len(mixes) - 1 - (last - first), len(mixes) - 1)
    graph = lower(quantize(prepared, mixes[first], precision), "fp16")
    return graph, {
        "images": len(seen),
        "held_out": len(held_out),
        "layers": len(mixes[first]),
        "of_layers": len(calibration.layers),
        "share_of_weights": round(sum(layer.levels.size for layer in mixes[first].values()) / weights, 4),
    }


def holds_with_margin(found: Agreement, precision: Precision) -> bool:
    """Whether each error is at most `_MARGIN` of the one that the gate allows."""
    gate = GATES[precision]
    return all(
        1 - got <= _MARGIN * (1 - least)
        for got, least in (
            (found.worst_cosine, gate.worst_cosine),
            (found.mean_cosine, gate.mean_cosine),
            (found.neighbours_kept, gate.top1_agreement),  # changes among ties must not decide
        )
    )
