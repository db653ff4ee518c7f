"""`clip-tools export-onnx`: exports the image tower of an open_clip model as the ONNX file that `clip_onnx` serves."""

import datetime
import importlib.metadata
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.accuracy.gates import GATES, Precision
from clip_tools.accuracy.sample import write_sample
from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError, needs_extra
from clip_tools.export import external_data
from clip_tools.export.external_data import DataFile, load_nodes
from clip_tools.export.manifest import GRAPH, Manifest, put_in_place
from clip_tools.export.vit_graph import OPSETS, Form, is_plain_vit, vit_graph
from clip_tools.oracle import Oracle, Weights, load_oracle
from clip_tools.paths import MODELS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx


MODEL_PATH = MODELS / "clip_onnx" / "1" / "model.onnx"
MAX_BATCH = 64
# The exported graph computes the same in FP32, in another order. The worst of 121 photographs had cosine 0.9999999 and
# an element difference of 1.3e-6, or 5.3e-5 with more sensitive weights (docs/results/precision/b-*-fp32.json). The
# limit is four times that, and any real mistake is far larger.
MIN_COSINE = GATES["fp32"].worst_cosine
MAX_ABS_DIFFERENCE = 2e-4
_BATCHES = (1, 2, 5, 16)


def export_onnx(
    weights: Weights,
    photographs: Sequence[bytes],
    output: Path = MODEL_PATH,
    *,
    oracle: Oracle | None = None,
    largest_bytes: int = external_data.LARGEST_BYTES,
) -> Manifest:
    """Export, compare with PyTorch, then put model, manifest and sample in place. Raises ToolError on drift.

    The graph: `pixels` (batch, side, side, 3) uint8 RGB -> `embedding` (batch, D) float32 with L2 norm 1. It includes
    the layout change, `(x / 255 - mean) / std`, the tower, the projection and the norm. No file is replaced until the
    comparison has passed. `oracle`: the one of the weights, if it is loaded already.
    """
    if not photographs:
        raise ToolError("the export is compared on photographs, and none were given")
    oracle = oracle or load_oracle(weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        draft = Path(folder) / output.name
        write_graph(oracle, draft, largest_bytes=largest_bytes)
        worst_cosine, max_abs_difference = compare(oracle, draft, photographs)
        manifest = make_manifest(
            draft, weights, "fp32", worst_cosine, max_abs_difference, tensors=tensors_of(draft), fit=dict(oracle.fit)
        )
        put_in_place(draft, manifest, output)
    write_sample(output, weights, photographs, oracle)
    return manifest


def make_manifest(
    draft: Path,
    weights: Weights,
    precision: Precision,
    worst_cosine: float,
    max_abs_difference: float,
    *,
    opset: int = OPSETS["portable"],
    **further: Any,
) -> Manifest:
    """The manifest of a file that was just exported from these weights."""
    return Manifest(
        sha256=sha256_of(draft),
        model=weights.model,
        pretrained=Path(weights.pretrained).name if weights.checkpoint_sha256 else weights.pretrained,
        checkpoint_sha256=weights.checkpoint_sha256,
        trained=weights.seed is None,
        precision=precision,
        opset=opset,
        max_batch=MAX_BATCH,
        worst_cosine=round(worst_cosine, 8),
        max_abs_difference=float(f"{max_abs_difference:.2e}"),
        versions={
            name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "onnx", "onnxscript")
        },
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        graph=GRAPH,
        **further,
    )


def tensors_of(draft: Path) -> dict[str, list[int]]:
    """The dimensions of a graph's inputs and outputs by name, without the batch."""
    graph = load_nodes(draft).graph
    return {
        tensor.name: [dim.dim_value for dim in tensor.type.tensor_type.shape.dim][1:]
        for tensor in (*graph.input, *graph.output)
    }


def write_graph(
    oracle: Oracle, path: Path, form: Form = "portable", *, largest_bytes: int = external_data.LARGEST_BYTES
) -> None:
    """Write the FP32 graph of the oracle's image tower, without comparing it.

    `vit_graph` writes a plain ViT in this form, torch.onnx.export any other tower. Weights of more than `largest_bytes`
    go to a second file.
    """
    import torch

    visual = oracle.model.visual
    large = external_data.is_large(visual.parameters(), largest_bytes)
    if is_plain_vit(visual):
        write(lambda data: vit_graph(visual, oracle.mean, oracle.std, form, data), path, large=large)
        return

    class PixelsToEmbedding(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        """uint8 NHWC in, unit-norm embedding out."""

        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.visual = oracle.model.visual
            self.register_buffer("mean", torch.tensor(oracle.mean).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(oracle.std).view(1, 3, 1, 1))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            # The cast comes first: TensorRT can do nothing else with uint8.
            scaled = pixels.to(torch.float32).permute(0, 3, 1, 2) / 255
            image_features = self.visual((scaled - self.mean) / self.std)
            return torch.nn.functional.normalize(image_features, dim=-1)

    image_size = oracle.model.visual.image_size
    height, width = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    pixels = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    trace(PixelsToEmbedding().eval(), pixels, "pixels", path, large=large)


def write(make: "Callable[[DataFile | None], onnx.ModelProto]", path: Path, *, large: bool) -> None:
    """Write the graph that `make` returns. For a large one, `make` gets the data file for its weights."""
    import onnx

    if not large:
        onnx.save(make(None), str(path))
        return
    with DataFile(path) as data:
        onnx.save(make(data), str(path))


def trace(module: Any, example: Any, name: str, path: Path, *, large: bool = False) -> None:
    """Write the torch.onnx.export of a module that takes one tensor of this name and returns `embedding`."""
    import torch

    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # the exporter's own deprecations
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[name],
                output_names=["embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
                opset_version=OPSETS["portable"],
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise ToolError("torch.onnx.export gave no program: this torch is newer than these tools")
    outputs = program.model.graph.outputs
    for value in [value for node in program.model.graph for value in node.outputs]:
        if value.name == "embedding" and value not in outputs:  # a look-up in a text tower gets this name too
            value.name = "looked_up"
    program.save(str(path), external_data=large)


def compare(oracle: Oracle, model_path: Path, photographs: Sequence[bytes]) -> tuple[float, float]:
    """(Worst cosine, largest element difference) of the ONNX file to PyTorch, both in FP32 on the CPU.

    It embeds the photographs and random pixels, in batches of several sizes. Raises ToolError if they differ.
    """
    import numpy as np
    import torch

    pixels = np.stack([oracle.pixels(data) for data in photographs])
    noise = np.random.default_rng(0).integers(0, 256, (4, *pixels.shape[1:]), dtype=np.uint8)
    pixels = np.concatenate([pixels, noise])
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(oracle.mean).view(1, 3, 1, 1), torch.tensor(oracle.std).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = oracle.model.encode_image((scaled - mean) / std, normalize=True).numpy()
    return check_drift(model_path, "pixels", pixels, expected)


def check_drift(
    model_path: Path, name: str, inputs: "npt.NDArray[Any]", expected: "npt.NDArray[np.float32]"
) -> tuple[float, float]:
    """(Worst cosine, largest element difference) of the file's embeddings to `expected`. Raises ToolError on drift."""
    with needs_extra("cpu"):
        import numpy as np
        import onnxruntime
    session = onnxruntime.InferenceSession(str(model_path), providers=["CPUExecutionProvider"])
    cosines, differences = [], []
    batches, start = itertools.cycle(_BATCHES), 0
    while start < len(inputs):
        rows = slice(start, start := start + next(batches))
        (got,) = session.run(["embedding"], {name: inputs[rows]})
        if got.shape != expected[rows].shape:
            raise ToolError(f"the exported graph gives {got.shape} for a batch of {len(expected[rows])}")
        cosines.append((got * expected[rows]).sum(axis=1).min())
        differences.append(np.abs(got - expected[rows]).max())
    # numpy's min and max keep a NaN, unlike Python's. It compares false, so it fails here too.
    worst_cosine, max_abs_difference = float(np.min(cosines)), float(np.max(differences))
    if not (worst_cosine >= MIN_COSINE and max_abs_difference <= MAX_ABS_DIFFERENCE):
        raise ToolError(
            f"the exported graph drifts from PyTorch: worst cosine {worst_cosine:.7f} (at least {MIN_COSINE}), "
            f"largest difference {max_abs_difference:.1e} (at most {MAX_ABS_DIFFERENCE:.0e}); nothing was written"
        )
    return worst_cosine, max_abs_difference
