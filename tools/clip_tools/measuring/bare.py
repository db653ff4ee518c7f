"""The two steps without a server: `preprocess` and the engine, run in this process exactly as they are served."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError, missing_extra
from clip_tools.gpu import find_gpu
from clip_tools.paths import BACKENDS, MODELS
from clip_tools.repository import deployment, read_config


def import_preprocess(models: Path = MODELS) -> Any:
    """`clip_preprocess` of the model repository: what `preprocess` runs for one image."""
    return _import_from(models / "preprocess" / "1", "clip_preprocess")


def _import_from(folder: Path, name: str) -> Any:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)


def open_preprocess(models: Path = MODELS, config_name: str | None = None) -> Callable[[bytes], Any]:
    """What `preprocess` does with one image under this configuration: bytes -> (224, 224, 3) uint8 RGB."""
    parameters = {
        key: one.string_value for key, one in read_config(models, "preprocess", config_name).parameters.items()
    }
    opened: Callable[[bytes], Any] = import_preprocess(models).open_pixels(parameters)
    return opened


def open_batches(models: Path = MODELS, config_name: str | None = "gpu") -> Callable[[Sequence[bytes]], Any]:
    """The same of many images at once on a GPU, where their pixels stay. Raises ToolError where it cannot be had."""
    parameters = {
        key: one.string_value for key, one in read_config(models, "preprocess", config_name).parameters.items()
    }
    preprocess = import_preprocess(models)
    try:
        batches = _import_from(models / "preprocess" / "1", "clip_gpu").open_batches(parameters)
    except ValueError as error:
        raise ToolError(str(error)) from error

    def pixels_of(images: Sequence[bytes]) -> Any:
        return batches([(one, preprocess.PixelBudget(1 << 62)) for one in images], batches.on_cpu)

    return pixels_of


def open_engine(models: Path = MODELS, config_name: str | None = None) -> Any:
    """The ONNX Runtime session that `backends/onnxruntime` opens for this deployment on this machine.

    Raises ToolError where it cannot be opened, with the backend's reason.
    """
    file, plan = engine_plan(models, config_name)
    with _backend() as backend:
        return backend.open_session(file, plan)


def engine_plan(models: Path = MODELS, config_name: str | None = None) -> tuple[Path, Any]:
    """The deployment's ONNX file, and the backend's `SessionPlan` for it on this machine. Raises ToolError for none."""
    from google.protobuf import json_format

    model = next((one for one in deployment(models, config_name) if one.config.backend == "onnxruntime"), None)
    if model is None or model.file is None:
        raise ToolError(f"the deployment '{config_name or 'default'}' has no onnxruntime model to run bare")
    config = json.loads(json_format.MessageToJson(model.config, preserving_proto_field_name=True))
    with _backend() as backend:
        return model.file, backend.session_plan(config, instance_kind(model.config), 0)


def runs_here(models: Path, config_name: str) -> bool:
    """Whether this machine has the providers and the precision that a configuration asks for."""
    _, plan = engine_plan(models, config_name)
    try:
        with _backend() as backend:
            backend.check_plan(plan)
    except ToolError:
        return False
    return True


@contextlib.contextmanager
def _backend() -> Iterator[Any]:
    """`ort_session` of the backend; what it refuses is a ToolError."""
    try:
        backend = _import_from(BACKENDS / "onnxruntime", "ort_session")
    except ImportError as error:
        raise missing_extra("cpu", error) from error
    try:
        yield backend
    except backend.ConfigError as error:
        raise ToolError(str(error)) from error


def instance_kind(config: Any) -> str:
    """Where Triton runs the model on this machine, "GPU" or "CPU": KIND_AUTO is the GPU where there is one."""
    kinds = {group.Kind.Name(group.kind) for group in config.instance_group} or {"KIND_AUTO"}
    is_gpu = "KIND_GPU" in kinds or ("KIND_AUTO" in kinds and find_gpu() is not None)
    return "GPU" if is_gpu else "CPU"


def throughput_bound(preprocess_s: float, engine_s: float, cores: int, *, on_gpu: bool = False) -> float:
    """The images a second that no server of these two steps can pass on these cores.

    An image costs `preprocess_s` of one core and `engine_s` of all of them, for the engine fills every core while it
    runs: cores / (preprocess core-seconds + engine core-seconds). On a GPU it takes none, and the slower step decides.
    """
    if on_gpu:
        return min(cores / preprocess_s, 1 / engine_s)
    return cores / (preprocess_s + engine_s * cores)


class Worker:
    """Holds the session open between rounds, so that a round measures no start."""

    def __init__(self, models: Path, config_name: str | None, batches: Sequence[int]) -> None:
        import numpy as np

        self._preprocess = open_preprocess(models, config_name)
        self._on_gpu = engine_plan(models, config_name)[1].on_gpu
        self._session = open_engine(models, config_name)
        self._batches = (*batches, 64) if self._on_gpu else tuple(batches)  # a GPU's best is the largest
        self._np = np

    def steps(self, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
        """Each step alone: `preprocess_s` of one thread for an image, and the engine's `engine_s` by batch size."""
        np = self._np
        pixels = [self._preprocess(image) for image in images]
        engine_s = {}
        for batch in self._batches:
            feed = {"pixels": np.stack([pixels[i % len(pixels)] for i in range(batch)])}
            times = _times(lambda _, feed=feed: self._session.run(["embedding"], feed), seconds / len(self._batches))
            engine_s[batch] = sum(times) / len(times) / batch
        times = _times(lambda turn: self._preprocess(images[turn % len(images)]), seconds, at_least=len(images))
        cores = len(os.sched_getaffinity(0))
        alone = {"preprocess_s": sum(times) / len(times), "engine_s": engine_s}
        return {"cores": cores, "on_gpu": self._on_gpu, **alone}

    def single(self, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
        """`single_ms`: the time of each image through both steps, one after the other."""

        def both(turn: int) -> None:
            pixels = self._preprocess(images[turn % len(images)])
            self._session.run(["embedding"], {"pixels": pixels[None]})

        return {"single_ms": [round(1000 * time_s, 3) for time_s in _times(both, seconds, at_least=len(images))]}


def _times(call: Any, seconds: float, *, at_least: int = 3) -> list[float]:
    """The seconds of each call, for `seconds` and at least so many calls; one more before them warms up."""
    call(0)
    times: list[float] = []
    while sum(times) < seconds or len(times) < at_least:
        begin = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - begin)
    return times


class BareWorker:
    """`clip_tools.measuring.bare` in a process of its own, asked once a round."""

    def __init__(self, models: Path, config_name: str | None, images: Sequence[bytes]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="clip-bare-")
        self._paths = []
        for index, image in enumerate(images):
            path = Path(self._folder.name) / f"{index:05}.jpg"
            path.write_bytes(image)
            self._paths.append(str(path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clip_tools.measuring.bare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = {"models": str(models), "config_name": config_name, "batches": [1, 4, 8, 16]}
        self._say(first)
        self._hear()

    def measure(self, part: str, seconds: float) -> dict[str, Any]:
        """What `Worker.steps` or `Worker.single` gives, as `part` says."""
        self._say({"part": part, "images": self._paths, "seconds": seconds})
        answer: dict[str, Any] = json.loads(self._hear())
        return answer

    def _say(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None  # noqa: S101
        line = self._process.stdout.readline()
        if not line:
            raise ToolError("the bare engine ended: see the lines above")
        return line

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(timeout=30)
        self._folder.cleanup()


def main() -> None:
    """Serve rounds over a pipe, for `bench`: a JSON line in asks for one, a JSON line out answers."""
    first = json.loads(sys.stdin.readline())
    try:
        worker = Worker(Path(first["models"]), first["config_name"], first["batches"])
    except ToolError as error:
        sys.exit(f"bare: {error}")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        images = [Path(path).read_bytes() for path in order["images"]]
        measure = worker.single if order["part"] == "single" else worker.steps
        sys.stdout.write(json.dumps(measure(images, order["seconds"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
