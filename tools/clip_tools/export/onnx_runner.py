"""Runs an ONNX file on this CPU, with the rounding of its precision."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.errors import ToolError, needs_extra
from clip_tools.export.external_data import LARGEST_BYTES, load_graph, load_nodes, save_graph
from clip_tools.export.precision import emulate_in_fp32, is_low
from clip_tools.progress import Tell, silent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

NATIVE = "ONNX Runtime's CPU provider, as the file is"
EMULATED = (
    "ONNX Runtime's CPU provider in FP32 arithmetic, every value rounded to FP16 or BF16 where the graph is; "
    "Q/DQ pairs as they are"
)


@dataclass(frozen=True)
class OnnxRun:
    """Embeddings (N, 512) float32, and a description of how they were computed."""

    embeddings: "npt.NDArray[np.float32]"
    how: str


def run_onnx(
    model: "onnx.ModelProto | Path",
    inputs: "npt.NDArray[Any]",
    *,
    batch_size: int = 8,
    tell: Tell = silent,
    what: str = "",
) -> OnnxRun:
    """The embeddings of (N, 224, 224, 3) uint8 RGB pixels, or (N, context) tokens. `what` is this step for `tell`.

    A graph with FP16 or BF16 types is emulated in FP32. Raises ToolError for a file that ONNX Runtime refuses.
    """
    with needs_extra("cpu"):
        import numpy as np
        import onnxruntime  # noqa: F401
    title = model.name if isinstance(model, Path) else "the graph"
    try:
        graph = load_nodes(model) if isinstance(model, Path) else model
        if low := is_low(graph):
            session = open_session(emulate_in_fp32(load_graph(model) if isinstance(model, Path) else model))
        else:
            session = open_session(model)
        rows = []
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            rows.append(session.run(["embedding"], {graph.graph.input[0].name: batch})[0])
            tell(what, start + len(batch), len(inputs))
    except ToolError:
        raise
    except Exception as error:  # protobuf's and ONNX Runtime's errors have many types
        line = " ".join(str(error).split())[:300]
        raise ToolError(f"{title}: ONNX Runtime cannot run it: {line}") from error
    return OnnxRun(np.concatenate(rows), EMULATED if low else NATIVE)


def open_session(model: "onnx.ModelProto | Path") -> Any:
    """An ONNX Runtime session on the CPU that computes the graph exactly as written."""
    import onnxruntime

    if not isinstance(model, Path) and model.ByteSize() > LARGEST_BYTES:
        with tempfile.TemporaryDirectory(prefix="clip-graph-") as folder:
            save_graph(model, path := Path(folder) / "graph.onnx")
            return open_session(path)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it raises what it logs
    # Q/DQ is not fused: ONNX Runtime 1.24 would give FP8 to a kernel for INT8 and refuse the model.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    source = str(model.resolve()) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
