"""`clip-tools bench --preprocess`: `preprocess` alone on one core, resizing by its library and by Pillow in turns."""

import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.gpu import find_gpu
from clip_tools.in_process import import_preprocess, open_batches, open_preprocess
from clip_tools.measuring.cells import Cell, NotMeasured
from clip_tools.measuring.noise import Ratio, paired_ratio
from clip_tools.measuring.options import PHONE, VGA, BenchOptions
from clip_tools.measuring.results import begin
from clip_tools.measuring.tables import Section, table
from clip_tools.measuring.targets import Target, check, verdicts_text
from clip_tools.measuring.timing import OwnProcess, times_of
from clip_tools.measuring.workload import load_images
from clip_tools.progress import Tell, silent

KERNEL, PILLOW, GPU = "library", "Pillow", "GPU"
_BATCH = 64  # images at once in mode gpu
_RESIZED = 4  # photographs kept decoded, 48 MB each


class _Worker:
    """One mode and one way to resize, on one core."""

    def __init__(self, models: Path, config_name: str | None, resized_by: str) -> None:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self._module = import_preprocess(models)
        if resized_by == PILLOW:
            self._module.find_kernel = lambda: None
        self._batches = open_batches(models, config_name) if resized_by == GPU else None
        self._preprocess: Any = None if self._batches else open_preprocess(models, config_name)

    def measure(self, name: str, seconds: float) -> dict[str, float]:
        """Seconds of CPU for an image: `preprocess_s` from its bytes on, `resize_s` from the decoded one on."""
        images = load_images(name)
        if self._batches:
            return mean_of_batches(self._batches, images, seconds)
        decoded = [self._load(image) for image in images[:_RESIZED]]
        whole = times_of(self._preprocess, images, seconds, time.process_time)
        resize = times_of(self._module.centre_of, decoded, seconds / 2, time.process_time)
        return {"preprocess_s": statistics.mean(whole), "resize_s": statistics.mean(resize)}

    def _load(self, image_bytes: bytes) -> Any:
        from PIL import Image

        with self._module.lent_memory():
            image = Image.open(io.BytesIO(image_bytes))
            image.load()
        return image


def mean_of_batches(call: Callable[[Any], Any], images: Sequence[bytes], seconds: float) -> dict[str, float]:
    """For an image: seconds of CPU, and seconds that pass, both in whole batches."""
    batch = [images[index % len(images)] for index in range(_BATCH)]
    call(batch)
    count, cpu_s, begin_s = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - begin_s < seconds:
        call(batch)
        count += _BATCH
    cpu_s, passed_s = time.process_time() - cpu_s, time.perf_counter() - begin_s
    return {"preprocess_s": cpu_s / count, "passed_s": passed_s / count}


def preprocess_alone(options: BenchOptions, *, tell: Tell = silent) -> dict[str, Any]:
    """The result as JSON-able data. Raises ToolError where there is no library to compare with Pillow."""
    models, rounds, seconds = options.models, options.rounds, options.seconds
    result, kernel = begin("preprocess"), import_preprocess(models).find_kernel()
    if kernel is None:
        raise ToolError("preprocess has no library of its own here, so there is nothing to compare: run `make setup`")
    ways: list[tuple[str | None, str]] = [(mode, way) for mode in (None, "fast") for way in (KERNEL, PILLOW)]
    if find_gpu() and find_spec("nvidia") and find_spec("nvidia.nvimgcodec"):
        ways.append(("gpu", GPU))
    rows = []
    with ExitStack() as stack:
        workers = [stack.enter_context(OwnProcess(_Worker, models, *way)) for way in ways]
        for name in (VGA, PHONE):
            for number in range(rounds):
                for done, ((mode, way), worker) in enumerate(zip(ways, workers, strict=True)):
                    tell(f"{name}, {mode or 'exact'}, {way}", number * len(ways) + done, rounds * len(ways))
                    times = worker.ask("measure", name, seconds)
                    key = {"images": name, "mode": mode or "exact", "resized_by": way, "round": number}
                    rows.append(key | {what: float(f"{time_s:.6g}") for what, time_s in times.items()})
    return result | {"rounds": rounds, "seconds": seconds, "avx2": kernel.form == 1, "rows": rows}


def _times(result: dict[str, Any], what: str, *of: str) -> list[float]:
    """A figure in each round, of these images, mode and way to resize."""
    found = [row[what] for row in result["rows"] if (row["images"], row["mode"], row["resized_by"]) == of]
    if not found:
        raise NotMeasured(f"{of[1]} with {of[0]}")
    return found


def _target(key: str, title: str, wanted: float, images: str, what: str) -> Target:
    def gain(result: dict[str, Any], _: Sequence[Cell]) -> Ratio:
        return paired_ratio(*(_times(result, what, images, "exact", way) for way in (PILLOW, KERNEL)))

    return Target(key, title, wanted, (), gain)


TARGETS = (
    _target("exact", "exact, 640x480, against Pillow", 2.0, VGA, "preprocess_s"),
    _target("exact-phone", "exact, 12 MP, against Pillow", 1.5, PHONE, "preprocess_s"),
    _target("resize", "resize and crop alone, 640x480, against Pillow", 4.0, VGA, "resize_s"),
    _target("resize-phone", "the same, 12 MP", 4.0, PHONE, "resize_s"),
)


def preprocess_section(_: str, result: dict[str, Any]) -> Section:
    """Targets, and each mode by the size of the images."""

    def median_ms(what: str, *of: str) -> float:
        return 1000 * statistics.median(_times(result, what, *of))

    rows, on_gpu = [], []
    for images, mode in dict.fromkeys((row["images"], row["mode"]) for row in result["rows"]):
        for way in (GPU,) if mode == "gpu" else (PILLOW, KERNEL):
            ms = median_ms("preprocess_s", images, mode, way)
            resize = f"{median_ms('resize_s', images, mode, way):.2f}" if mode == "exact" else ""
            rows.append(f"{images} | {mode} | {way} | {1000 / ms:.1f} | {ms:.2f} | {resize}")
        if mode == "gpu":
            on_gpu.append(f"{1000 / median_ms('passed_s', images, mode, GPU):.0f} of {images}")
    text = (
        f"`preprocess` alone, bytes to pixels, one process on one core; the library "
        f"{'with AVX2' if result['avx2'] else 'in its portable form'}. CPU time of {result['rounds']} rounds of "
        f"{result['seconds']:g} s, the ways in turn, so a ratio has the same machine in both its parts. Both give the "
        "same bytes (tests/parity/test_resample.py).\n\n"
    )
    if on_gpu:
        text += f"In mode `gpu`, in batches of {_BATCH}, one process made {', '.join(on_gpu)} a second.\n\n"
    head = "images | mode | resized by | images/s a core | ms an image | of it resize and crop"
    return Section(f"{text}{verdicts_text(check(result, TARGETS))}\n{table(head, rows)}")
