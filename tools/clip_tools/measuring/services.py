"""The servers that `clip-tools bench` measures: each in processes of its own, on free ports, started once."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring.arms import Arm, Caller, open_caller
from clip_tools.measuring.variants import TENSOR_MODEL, Variant, write_repository
from clip_tools.measuring.workload import Workload
from clip_tools.oracle import Weights
from clip_tools.paths import CACHE, MODELS
from clip_tools.serving.serve import EmbeddedServer, ServeOptions


class TritonService:
    """The embedded server of one variant, on free ports."""

    def __init__(self, variant: Variant, models: Path = MODELS) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="clip-bench-")
        try:
            repository = write_repository(variant, Path(self._folder.name) / "models", models)
            http, grpc, metrics = free_ports(3)
            self.options = ServeOptions(
                models=repository,
                config_name=variant.config_name,
                http_port=http,
                grpc_port=grpc,
                metrics_port=metrics,
                log=CACHE / "bench" / f"tritonserver-{grpc}.log",
                arguments=(f"--load-model={TENSOR_MODEL}",) if variant.with_tensor_model else (),
            )
            self._server = EmbeddedServer(self.options)
            begin = time.perf_counter()
            self._server.__enter__()
            self.start_s = time.perf_counter() - begin
        except BaseException:
            self._folder.cleanup()
            raise

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return self._server.pid

    @property
    def repository(self) -> Path:
        """The variant's model repository."""
        return self.options.models

    def stop(self) -> None:
        """End the server and remove its repository and its log."""
        self._server.stop()
        self._folder.cleanup()
        if self.options.log:
            self.options.log.unlink(missing_ok=True)


class PyTorchService:
    """The service of `clip_tools.measuring.baseline` in a process of its own, once it has embedded an image."""

    def __init__(self, weights: Weights) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "clip_tools.measuring.baseline", "--model", weights.model]
        command += ["--pretrained", weights.pretrained, "--port", str(port)]
        begin = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )
        try:
            self._wait(begin + 180)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - begin

    def _wait(self, deadline: float) -> None:
        from clip_embed import EmbeddingClient
        from clip_tools.serving.serve import probe_image

        with EmbeddingClient(self.url, backend="pytorch", timeout_s=60, retry=None) as client:
            while not client.is_ready():
                if self._process.poll() is not None or time.perf_counter() > deadline:
                    self._log.seek(0)
                    last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
                    raise ToolError(f"the PyTorch service did not start: {last}")
                time.sleep(0.1)
            client.embed([probe_image()])

    @property
    def pid(self) -> int:
        """The process id of uvicorn."""
        return self._process.pid

    def stop(self) -> None:
        """End the service."""
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass
class Deployment:
    """The running servers of a set of arms, one for each variant, as a context manager."""

    arms: tuple[Arm, ...]
    weights: Weights
    models: Path = MODELS
    _services: dict[object, Any] = field(default_factory=dict, init=False)
    _callers: dict[tuple[Arm, str], Caller] = field(default_factory=dict, init=False)

    def __enter__(self) -> "Deployment":
        try:
            for arm in self.arms:
                self.service(arm)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for caller in self._callers.values():
            caller.close()
        for service in self._services.values():
            service.stop()

    def service(self, arm: Arm) -> Any:
        """The running TritonService or PyTorchService behind an arm."""
        key = "pytorch" if arm.kind == "pytorch" else (arm.config_name, arm.preprocess_instances)
        if key not in self._services:
            if arm.kind == "pytorch":
                self._services[key] = PyTorchService(self.weights)
            else:
                mates = [one for one in self.arms if one.kind != "pytorch"]
                tensors = any(
                    one.needs_tensor_model and (one.config_name, one.preprocess_instances) == key for one in mates
                )
                variant = Variant(arm.config_name, arm.preprocess_instances, with_tensor_model=tensors)
                self._services[key] = TritonService(variant, self.models)
        return self._services[key]

    def services(self) -> dict[str, Any]:
        """Each running server by the name of its variant."""
        return {
            "pytorch" if key == "pytorch" else Arm("triton", *key).name: service  # type: ignore[misc]
            for key, service in self._services.items()
        }

    def caller(self, arm: Arm, workload: Workload) -> Caller:
        """What asks the arm for a workload's images; opened once."""
        key = (arm, workload.name)
        if key not in self._callers:
            self._callers[key] = open_caller(arm, self.service(arm), workload)
        return self._callers[key]


def resident_mib(pid: int) -> float:
    """The memory that a process and its children hold, MiB; pages that several share are counted once."""
    import psutil

    total = 0
    parent = psutil.Process(pid)
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return float(total / 2**20)


def cpu_seconds(pid: int) -> float:
    """The CPU time that a process and its children have used so far, s."""
    import psutil

    total = 0.0
    parent = psutil.Process(pid)
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
