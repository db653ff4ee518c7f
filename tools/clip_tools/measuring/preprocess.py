"""`clip-tools bench --preprocess`: `preprocess` alone on one core, resizing by its library and by Pillow in turns."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.gpu import find_gpu
from clip_tools.measuring.bare import import_preprocess, open_batches, open_preprocess
from clip_tools.measuring.bench_section import verdicts_text
from clip_tools.measuring.fingerprint import fingerprint
from clip_tools.measuring.noise import Ratio, paired_ratio
from clip_tools.measuring.sections import Section, markdown_table
from clip_tools.measuring.targets import NotMeasured, Target, check
from clip_tools.measuring.workload import PHONE, VGA, load_images
from clip_tools.paths import MODELS

KERNEL, PILLOW, GPU = "library", "Pillow", "GPU"
MODES = (None, "fast")  # configurations of preprocess; `gpu` besides where there is one
_BATCH = 64  # images at once in mode gpu
_RESIZED = 4  # photographs kept decoded, 48 MB each


class _Worker:
    """A process's own state: one mode, one way to resize, on one core."""

    one: "_Worker"

    def __init__(self, models: Path, config_name: str | None, resized_by: str) -> None:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self._module = import_preprocess(models)
        if resized_by == PILLOW:
            self._module.find_kernel = lambda: None
        self._batches = open_batches(models, config_name) if resized_by == GPU else None
        self._preprocess: Any = None if self._batches else open_preprocess(models, config_name)
        self._images: dict[str, tuple[bytes, ...]] = {}
        self._decoded: dict[str, list[Any]] = {}

    def measure(self, name: str, seconds: float) -> dict[str, float]:
        """Seconds of CPU for an image: `preprocess_s` from its bytes on, `resize_s` from the decoded one on."""
        if name not in self._images:
            self._images[name] = load_images(name)
        if self._batches:
            return _mean_of_batches(self._batches, self._images[name], seconds)
        if name not in self._decoded:
            self._decoded = {name: [self._load(image) for image in self._images[name][:_RESIZED]]}
        images, decoded = self._images[name], self._decoded[name]
        return {
            "preprocess_s": _mean_cpu_s(self._preprocess, images, seconds),
            "resize_s": _mean_cpu_s(self._module.centre_of, decoded, seconds / 2),
        }

    def _load(self, image_bytes: bytes) -> Any:
        from io import BytesIO

        from PIL import Image

        with self._module.lent_memory():
            image = Image.open(BytesIO(image_bytes))
            image.load()
        return image


def _mean_cpu_s(call: Callable[[Any], Any], inputs: Sequence[Any], seconds: float) -> float:
    """Of one call, over whole passes through the inputs. Others may use the core: their time does not count."""
    call(inputs[0])
    calls, begin = 0, time.process_time()
    while time.process_time() - begin < seconds or calls % len(inputs):
        call(inputs[calls % len(inputs)])
        calls += 1
    return (time.process_time() - begin) / calls


def _mean_of_batches(call: Callable[[Any], Any], images: Sequence[bytes], seconds: float) -> dict[str, float]:
    """For an image: seconds of CPU, and seconds that pass, both in whole batches."""
    batch = [images[index % len(images)] for index in range(_BATCH)]
    call(batch)
    count, cpu_s, begin = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        call(batch)
        count += _BATCH
    return {
        "preprocess_s": (time.process_time() - cpu_s) / count,
        "passed_s": (time.perf_counter() - begin) / count,
    }


def _open(models: Path, config_name: str | None, resized_by: str) -> None:
    _Worker.one = _Worker(models, config_name, resized_by)


def _measure(name: str, seconds: float) -> dict[str, float]:
    return _Worker.one.measure(name, seconds)


def preprocess_alone(
    *,
    images: Sequence[str] = (VGA, PHONE),
    rounds: int = 5,
    seconds: float = 4.0,
    models: Path = MODELS,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """The result as JSON-able data. Raises ToolError where there is no library to compare with Pillow."""
    module = import_preprocess(models)
    if module.find_kernel() is None:
        raise ToolError("preprocess has no library of its own here, so there is nothing to compare: run `make setup`")
    rows = []
    with ExitStack() as stack:
        workers = {
            (mode, way): stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), initializer=_open, initargs=(models, mode, way))
            )
            for mode, way in [
                *((mode, way) for mode in MODES for way in (KERNEL, PILLOW)),
                *([("gpu", GPU)] if find_gpu() and find_spec("nvidia") and find_spec("nvidia.nvimgcodec") else []),
            ]
        }
        for name in images:
            for number in range(rounds):
                for done, ((mode, way), worker) in enumerate(workers.items()):
                    tell(f"{name}, {mode or 'exact'}, {way}", number * len(workers) + done, rounds * len(workers))
                    times = worker.submit(_measure, name, seconds).result()
                    key = {"images": name, "mode": mode or "exact", "resized_by": way, "round": number}
                    rows.append(key | {what: float(f"{time_s:.6g}") for what, time_s in times.items()})
    return {
        "kind": "preprocess",
        "environment": asdict(fingerprint()),
        "rounds": rounds,
        "seconds": seconds,
        "avx2": module.find_kernel().form == 1,
        "rows": rows,
    }


def _times(result: dict[str, Any], images: str, mode: str, way: str, what: str) -> list[float]:
    found = [
        row[what] for row in result["rows"] if (row["images"], row["mode"], row["resized_by"]) == (images, mode, way)
    ]
    if not found:
        raise NotMeasured(f"{mode} with {images}")
    return found


def _gain(images: str, mode: str, what: str) -> Callable[[dict[str, Any]], Ratio]:
    """How many times as fast as with Pillow."""
    return lambda result: paired_ratio(*(_times(result, images, mode, way, what) for way in (PILLOW, KERNEL)))


TARGETS = (
    Target("exact", "exact, 640x480, against Pillow", 2.0, (), _gain(VGA, "exact", "preprocess_s")),
    Target("exact-phone", "exact, 12 MP, against Pillow", 1.5, (), _gain(PHONE, "exact", "preprocess_s")),
    Target("resize", "resize and crop alone, 640x480, against Pillow", 4.0, (), _gain(VGA, "exact", "resize_s")),
    Target("resize-phone", "the same, 12 MP", 4.0, (), _gain(PHONE, "exact", "resize_s")),
)


def preprocess_section(name: str, result: dict[str, Any]) -> Section:
    """Targets, and each mode by the size of the images."""
    import statistics

    def median(images: str, mode: str, way: str, what: str) -> float:
        return statistics.median(_times(result, images, mode, way, what))

    rows, on_gpu = [], []
    for images, mode in dict.fromkeys((row["images"], row["mode"]) for row in result["rows"]):
        for way in (GPU,) if mode == "gpu" else (PILLOW, KERNEL):
            whole = median(images, mode, way, "preprocess_s")
            resize_ms = f"{1000 * median(images, mode, way, 'resize_s'):.2f}" if mode == "exact" else ""
            rows.append((images, mode, way, f"{1 / whole:.1f}", f"{1000 * whole:.2f}", resize_ms))
        if mode == "gpu":
            on_gpu.append(f"{1 / median(images, mode, GPU, 'passed_s'):.0f} of {images}")
    head = ("images", "mode", "resized by", "images/s a core", "ms an image", "of it resize and crop")
    text = (
        f"`preprocess` alone, bytes to pixels, one process on one core; the library "
        f"{'with AVX2' if result['avx2'] else 'in its portable form'}. CPU time of {result['rounds']} rounds of "
        f"{result['seconds']:g} s, the ways in turn, so a ratio has the same machine in both its parts. Both give the "
        "same bytes (tests/parity/test_resample.py).\n\n"
    )
    if on_gpu:
        text += f"In mode `gpu`, in batches of {_BATCH}, one process made {', '.join(on_gpu)} a second.\n\n"
    return Section(text + verdicts_text(check(result, TARGETS)) + "\n" + markdown_table(head, rows))
