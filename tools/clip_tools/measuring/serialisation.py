"""`clip-tools serialisation`: what it costs to say the same images in four ways, without a server.

json          the normalised FP32 tensor as a JSON list of numbers
binary-fp32   the same tensor as Triton's raw bytes
binary-uint8  the pixels that `preprocess` makes, before normalisation
jpeg          the encoded file, as this project sends it
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from clip_tools.in_process import open_preprocess
from clip_tools.measuring.arms import client_tensors
from clip_tools.measuring.options import SerialisationOptions
from clip_tools.measuring.results import begin
from clip_tools.measuring.workload import load_images
from clip_tools.progress import Tell, silent


def serialisation(options: SerialisationOptions, *, tell: Tell = silent) -> dict[str, Any]:
    """Every format at every batch."""
    result, contents = begin("serialisation"), load_images(options.images)
    costs = []
    for done, batch in enumerate(options.batches):
        tell(f"batch {batch}", done, len(options.batches))
        costs += _costs([contents[index % len(contents)] for index in range(batch)], options.runs)
    images = {"name": options.images, "count": len(contents)}
    return result | {"images": images, "runs": options.runs, "costs": costs}


def _costs(images: list[bytes], runs: int) -> list[dict[str, Any]]:
    """The four formats of one batch, in turn; ms a batch, the median of the runs.

    `encode_ms` is from the tensor (JPEG: from the file's bytes) to what is sent, `decode_ms` from there to an array in
    the receiver's memory: for JPEG the bytes alone, since decoding the picture is `preprocess_ms`, which is shown for
    every format: with the first three the client pays it, with JPEG the server.
    """
    preprocess, tensors = open_preprocess(), client_tensors(images)
    pixels = np.stack([preprocess(image) for image in images])

    files = np.array(images, dtype=object)
    ways: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any], Any]] = {
        "json": (
            lambda: json.dumps({"shape": tensors.shape, "data": tensors.ravel().tolist()}).encode(),
            lambda body: np.array(json.loads(body)["data"], np.float32).reshape(tensors.shape),
            tensors,
        ),
        "binary-fp32": (tensors.tobytes, lambda body: np.frombuffer(body, np.float32).reshape(tensors.shape), tensors),
        "binary-uint8": (pixels.tobytes, lambda body: np.frombuffer(body, np.uint8).reshape(pixels.shape), pixels),
        "jpeg": (lambda: serialize_byte_tensor(files).item(), deserialize_bytes_tensor, files),
    }
    times_s: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}

    def timed(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        begin_s = time.perf_counter()
        made = call(*arguments)
        times_s.setdefault(what, []).append(time.perf_counter() - begin_s)
        return made

    for _ in range(runs):
        timed("preprocess", lambda: [preprocess(image) for image in images])
        for name, (encode, decode, wanted) in ways.items():
            body = timed(f"encode {name}", encode)
            got = timed(f"decode {name}", decode, body)
            sizes[name] = len(body)
            if not np.array_equal(got, wanted):
                raise AssertionError(f"{name} does not give back what went in")
    ms = {what: round(1000 * statistics.median(found), 4) for what, found in times_s.items()}
    return [
        {
            "format": name,
            "batch": len(images),
            "sent_bytes": size,
            "encode_ms": ms[f"encode {name}"],
            "decode_ms": ms[f"decode {name}"],
            "preprocess_ms": ms["preprocess"],
        }
        for name, size in sizes.items()
    ]
