"""The two steps without a server: `preprocess` and the engine, run in this process exactly as they are served."""

import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.paths import BACKENDS, MODELS
from clip_tools.repository import deployment, read_config


def import_preprocess(models: Path = MODELS) -> Any:
    """`clip_preprocess` of the model repository: what `preprocess` runs for one image."""
    return _import_from(models / "preprocess" / "1", "clip_preprocess")


def _import_from(folder: Path, name: str) -> Any:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)


def preprocess_limits(models: Path = MODELS, config_name: str | None = None) -> Any:
    """The limits that the configuration sets."""
    parameters = read_config(models, "preprocess", config_name).parameters
    return import_preprocess(models).Limits(
        max_image_bytes=int(parameters["max_image_bytes"].string_value),
        max_image_pixels=int(parameters["max_image_pixels"].string_value),
        formats=tuple(parameters["formats"].string_value.split()),
    )


def open_engine(models: Path = MODELS, config_name: str | None = None) -> Any:
    """The ONNX Runtime session that `backends/onnxruntime` opens for this deployment on a CPU."""
    from google.protobuf import json_format

    model = next((one for one in deployment(models, config_name) if one.config.backend == "onnxruntime"), None)
    if model is None or model.file is None:
        raise ToolError(f"the deployment '{config_name or 'default'}' has no onnxruntime model to run bare")
    ort_session = _import_from(BACKENDS / "onnxruntime", "ort_session")
    config = json.loads(json_format.MessageToJson(model.config, preserving_proto_field_name=True))
    return ort_session.open_session(model.file, ort_session.session_plan(config, "CPU", 0))


@dataclass(frozen=True)
class Bare:
    """Each step alone: `preprocess_s` is one thread's time an image, `engine_s` the engine's by batch size.

    `single_ms` are the times of one image through both steps, one after the other.
    """

    cores: int
    preprocess_s: float
    engine_s: dict[int, float]
    single_ms: list[float]

    @property
    def bound(self) -> float:
        """The images a second that no server of these two steps can pass on these cores.

        cores / (preprocess core-seconds + engine core-seconds) an image. The engine is taken at its best batch size
        and as if it filled every core, which is what it does while it runs.
        """
        return throughput_bound(self.preprocess_s, min(self.engine_s.values()), self.cores)


def throughput_bound(preprocess_s: float, engine_s: float, cores: int) -> float:
    """Images a second: `preprocess_s` on one core and `engine_s` on all of them for each image, nothing else."""
    return cores / (preprocess_s + engine_s * cores)


def measure(
    images: Sequence[bytes],
    seconds: float,
    *,
    batches: Sequence[int] = (1, 4, 8, 16),
    models: Path = MODELS,
    config_name: str | None = None,
) -> Bare:
    """Run each part for about `seconds`, after a warm-up."""
    return Worker(models, config_name, batches).measure(images, seconds)


class Worker:
    """Holds the session open between rounds, so that a round measures no start."""

    def __init__(self, models: Path, config_name: str | None, batches: Sequence[int]) -> None:
        import numpy as np

        self._pixels_of = import_preprocess(models).pixels_of
        self._limits = preprocess_limits(models, config_name)
        self._session = open_engine(models, config_name)
        self._batches = tuple(batches)
        self._np = np

    def measure(self, images: Sequence[bytes], seconds: float) -> Bare:
        """One round over the images; the first pass of each part is outside the timer."""
        import os

        np = self._np
        pixels = [self._pixels_of(image, self._limits) for image in images]

        def preprocess(turn: int) -> None:
            self._pixels_of(images[turn % len(images)], self._limits)

        def single(turn: int) -> None:
            one = self._pixels_of(images[turn % len(images)], self._limits)
            self._session.run(["embedding"], {"pixels": one[None]})

        engine_s = {}
        for batch in self._batches:
            feed = {"pixels": np.stack([pixels[i % len(pixels)] for i in range(batch)])}
            times = _times(lambda _, feed=feed: self._session.run(["embedding"], feed), seconds / len(self._batches))
            engine_s[batch] = sum(times) / len(times) / batch
        preprocess_times = _times(preprocess, seconds, at_least=len(images))
        return Bare(
            cores=len(os.sched_getaffinity(0)),
            preprocess_s=sum(preprocess_times) / len(preprocess_times),
            engine_s=engine_s,
            single_ms=[1000 * time_s for time_s in _times(single, seconds, at_least=len(images))],
        )


def _times(call: Any, seconds: float, *, at_least: int = 3) -> list[float]:
    """The seconds of each call, for `seconds` and at least so many calls; one more before them warms up."""
    call(0)
    times: list[float] = []
    while sum(times) < seconds or len(times) < at_least:
        begin = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    """Serve rounds over a pipe: a JSON line in asks for one, a JSON line out answers. For `clip_tools.bench`."""
    first = json.loads(sys.stdin.readline())
    worker = Worker(Path(first["models"]), first["config_name"], first["batches"])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        images = [Path(path).read_bytes() for path in order["images"]]
        sys.stdout.write(json.dumps(asdict(worker.measure(images, order["seconds"]))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
