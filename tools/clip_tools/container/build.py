"""Exported graphs and TensorRT plans: built at the first start, kept in the volume for later ones."""

import contextlib
import ctypes
import ctypes.util
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from clip_tools.container.settings import Settings
from clip_tools.container.start import exported_dir
from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError
from clip_tools.repository import graph_name
from clip_tools.serving.supervisor import Say


def plan_path(settings: Settings, graph: Path, gpu: str | None, runtime_version: str) -> Path:
    """The path in the volume of the plan for this graph, GPU, runtime and options."""
    parts = {
        "graph": sha256_of(graph),
        "gpu": gpu,
        "runtime": f"{settings.runtime} {runtime_version}",
        "precision": settings.precision,
        "batches": (1, settings.opt_batch, settings.max_batch),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return settings.cache_dir / "plans" / key / "model.plan"


def ensure_plan(settings: Settings, graph: Path, gpu: str | None, say: Say) -> Path:
    """The plan of this graph from the volume, built if missing or stale. Raises ToolError with the reason."""
    from clip_tools.tensorrt.build_engine import PlanOptions, build_engine, stale_reason

    version = _runtime_version(settings.runtime)
    plan = plan_path(settings, graph, gpu, version)
    try:
        with _lock(plan.parent.with_suffix(".lock"), say):
            if plan.is_file():
                stale = stale_reason(plan, onnx_path=graph)
                if stale is None:
                    say(f"TensorRT plan: using {plan}")
                    return plan
                say(f"TensorRT plan: building it again: {stale}")
            say(
                f"TensorRT plan: building {settings.precision} for batches of 1 to {settings.max_batch} on "
                f"{gpu or 'no GPU, ahead of time'} with {settings.runtime} {version}; once, some minutes"
            )
            plan.parent.mkdir(parents=True, exist_ok=True)
            options = PlanOptions(
                runtime=settings.runtime,
                precision=settings.precision,
                min_batch=1,
                opt_batch=settings.opt_batch,
                max_batch=settings.max_batch,
            )
            _in_subprocess(lambda: build_engine(graph, plan, options))
    except ToolError:
        raise
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room in it" if is_full else f"make it writable for user {os.getuid()}"
        raise ToolError(f"{settings.cache_dir} cannot be written ({error}): {advice}") from error
    except Exception as error:
        raise ToolError(f"{settings.runtime} {version} failed: {type(error).__name__}: {error}") from error
    return plan


def _in_subprocess(work: Callable[[], object]) -> None:
    """Run it in a child process: if TensorRT crashes or is killed for its memory, that is an error here.

    Raises what was raised there, or ToolError if the process ended.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # our handler would wait until TensorRT returns
        try:
            work()
            theirs.send(None)
        except Exception as error:
            theirs.send(error)

    process = context.Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        error = ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ToolError(
            f"the build was ended by {end}{': too little memory?' if code == -signal.SIGKILL else ''}"
        ) from None
    process.join()
    if error is not None:
        raise error


def _runtime_version(runtime: str) -> str:
    """The version of the Python package that builds. Raises ToolError if it is missing or not the server's."""
    try:
        version = importlib.metadata.version(runtime)
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolError(f"the Python package {runtime}, which builds the plan, is not in this image") from error
    served = served_tensorrt_version() if runtime == "tensorrt" else None
    if served is not None and version.split(".")[: len(served.split("."))] != served.split("."):
        raise ToolError(
            f"the server has TensorRT {served}, the Python package is {version}, and a plan loads in its own version "
            f"alone: build the image with --build-arg TENSORRT_VERSION={served}"
        )
    return version


def served_tensorrt_version() -> str | None:
    """The version of the server's libnvinfer, such as "10.13.3.9". None: not on the library path.

    All four numbers matter: 8.6.1.6 refused a plan of 8.6.1.2 (triton-inference-server/server#5975).
    """
    name = ctypes.util.find_library("nvinfer")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    number = int(library.getInferLibVersion())  # from 10 on: two digits each for minor and patch
    version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    build = getattr(library, "getInferLibBuildVersion", None)
    return version if build is None else f"{version}.{int(build())}"


@contextlib.contextmanager
def _lock(path: Path, say: Say) -> Iterator[None]:
    """One container builds; others with the same volume wait, then find the plan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("TensorRT plan: waiting for another container that builds it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def export(settings: Settings, precision: str, say: Say) -> Path:
    """Export the weights of CLIP_MODEL and CLIP_CHECKPOINT. Raises ToolError; the reason is in the log above."""
    output = exported_dir(settings) / graph_name(precision)
    output.parent.mkdir(parents=True, exist_ok=True)
    say(f"ONNX: exporting {settings.model or 'the default model'} in {precision}; once, about a minute")
    command = [sys.executable, "-m", "clip_tools", "export-onnx", f"--precision={precision}", f"--output={output}"]
    command += [f"--model={settings.model}"] if settings.model else []
    command += [f"--pretrained={settings.checkpoint}"] if settings.checkpoint else []
    # A child process, so that PyTorch's memory is free when the plan is built.
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
        raise ToolError(f"exporting {output.name} failed: the reason is in the lines above")
    return output
