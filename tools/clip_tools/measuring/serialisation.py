"""`clip-tools serialisation`: what it costs to say the same images in four ways, without a server.

json          the normalised FP32 tensor as a JSON list of numbers
binary-fp32   the same tensor as Triton's raw bytes
binary-uint8  the pixels that `preprocess` makes, before normalisation
jpeg          the encoded file, as this project sends it
"""

import json
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clip_tools.measuring.arms import client_tensors
from clip_tools.measuring.bare import open_preprocess
from clip_tools.measuring.fingerprint import fingerprint
from clip_tools.measuring.workload import VGA, load_images

FORMATS = ("json", "binary-fp32", "binary-uint8", "jpeg")


@dataclass(frozen=True)
class Cost:
    """One format at one batch. Times in ms a batch, the median of the runs.

    `encode_ms` is from the tensor (JPEG: from the file's bytes) to what is sent, `decode_ms` from there to an array in
    the receiver's memory: for JPEG the bytes alone, since decoding the picture is `preprocess_ms`, which is shown for
    every format: with the first three the client pays it, with JPEG the server.
    """

    format: str
    batch: int
    sent_bytes: int
    encode_ms: float
    decode_ms: float
    preprocess_ms: float


def serialisation(images: str = VGA, *, batches: Sequence[int] = (1, 2, 4, 8, 16, 32), runs: int = 7) -> dict[str, Any]:
    """Every format at every batch, as JSON-able data."""
    contents = load_images(images, count=32)
    costs = [
        cost for batch in batches for cost in measure([contents[i % len(contents)] for i in range(batch)], runs=runs)
    ]
    return {
        "kind": "serialisation",
        "environment": asdict(fingerprint()),
        "images": {"name": images, "count": len(contents)},
        "runs": runs,
        "costs": [asdict(cost) for cost in costs],
    }


def measure(images: Sequence[bytes], *, runs: int) -> list[Cost]:
    """The four formats of one batch, interleaved. What comes out is compared with what went in."""
    import numpy as np

    preprocess = open_preprocess()
    tensors = client_tensors(list(images))
    pixels = np.stack([preprocess(image) for image in images])

    def elements() -> bytes:
        return b"".join(part for image in images for part in (struct.pack("<I", len(image)), image))

    def split(body: bytes) -> list[bytes]:
        parts, at = [], 0
        while at < len(body):
            (size,) = struct.unpack_from("<I", body, at)
            parts.append(body[at + 4 : at + 4 + size])
            at += 4 + size
        return parts

    ways: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any], Any]] = {
        "json": (
            lambda: json.dumps({"shape": tensors.shape, "data": tensors.ravel().tolist()}).encode(),
            lambda body: np.array(json.loads(body)["data"], np.float32).reshape(tensors.shape),
            tensors,
        ),
        "binary-fp32": (tensors.tobytes, lambda body: np.frombuffer(body, np.float32).reshape(tensors.shape), tensors),
        "binary-uint8": (pixels.tobytes, lambda body: np.frombuffer(body, np.uint8).reshape(pixels.shape), pixels),
        "jpeg": (elements, split, list(images)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    preprocess_times = []
    for _ in range(runs):
        begin = time.perf_counter()
        for image in images:
            preprocess(image)
        preprocess_times.append(time.perf_counter() - begin)
        for name, (encode, decode, wanted) in ways.items():
            begin = time.perf_counter()
            body = encode()
            between = time.perf_counter()
            got = decode(body)
            times[name].append((between - begin, time.perf_counter() - between))
            sizes[name] = len(body)
            if not (got == wanted if isinstance(wanted, list) else np.array_equal(got, wanted)):
                raise AssertionError(f"{name} does not give back what went in")
    preprocess_ms = _median_ms(preprocess_times)
    return [
        Cost(
            name,
            len(images),
            sizes[name],
            _median_ms([encode for encode, _ in times[name]]),
            _median_ms([decode for _, decode in times[name]]),
            preprocess_ms,
        )
        for name in ways
    ]


def _median_ms(seconds: Sequence[float]) -> float:
    import statistics

    return round(1000 * statistics.median(seconds), 4)
