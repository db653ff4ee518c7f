"""Runs a TensorRT plan on this machine's GPU; torch only allocates its memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.errors import ToolError, needs_extra
from clip_tools.tensorrt.runtime import Runtime, load_tensorrt

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def run_plan(
    path: Path, pixels: "npt.NDArray[np.uint8]", *, runtime: Runtime, batch_size: int = 16
) -> "npt.NDArray[np.float32]":
    """(N, 512) float32: the plan's embeddings of (N, 224, 224, 3) uint8 RGB pixels, in batches within its profile.

    Raises ToolError without a GPU or the library, and for a plan of another TensorRT or GPU.
    """
    with needs_extra("export"):
        import numpy as np
        import torch
    if not torch.cuda.is_available():
        raise ToolError(
            f"{path}: a plan runs on an NVIDIA GPU, and no GPU was found here; run the same command on the GPU host, "
            "or verify the ONNX file that the plan was built from"
        )
    trt: Any = load_tensorrt(runtime)
    logger = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ToolError(f"{path}: {runtime} {trt.__version__} does not load it here; build it again on this machine")
    context = engine.create_execution_context()
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    smallest, _, largest = (shape[0] for shape in engine.get_tensor_profile_shape("pixels", 0))
    batch_size = max(smallest, min(batch_size, largest))
    rows = []
    with torch.cuda.stream(stream):
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + batch_size])).cuda()
            count = len(batch)
            if count < smallest:  # fill up to the profile's smallest batch; the extra rows are dropped
                batch = torch.cat([batch, batch[-1:].expand(smallest - count, -1, -1, -1)]).contiguous()
            context.set_input_shape("pixels", tuple(batch.shape))
            output = torch.empty(tuple(context.get_tensor_shape("embedding")), dtype=torch.float32, device="cuda")
            context.set_tensor_address("pixels", batch.data_ptr())
            context.set_tensor_address("embedding", output.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise ToolError(f"{path}: the engine failed at a batch of {len(batch)}; its log is above")
            stream.synchronize()
            rows.append(output[:count].cpu().numpy())
    embeddings: npt.NDArray[np.float32] = np.concatenate(rows)
    return embeddings
