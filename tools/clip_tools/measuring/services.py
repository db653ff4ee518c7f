"""The servers that `clip-tools bench` measures: each in processes of its own, on free ports, started once."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clip_tools.errors import ToolError, missing_extra
from clip_tools.measuring import steps
from clip_tools.measuring.arms import Arm, Caller, open_caller
from clip_tools.measuring.variants import TENSOR_MODEL, Variant, write_repository
from clip_tools.measuring.workload import Workload
from clip_tools.oracle import Weights
from clip_tools.paths import CACHE, MODELS
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer


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

    def __init__(self, weights: Weights, precision: str = "fp32") -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "clip_tools.measuring.baseline", "--model", weights.model]
        command += ["--pretrained", weights.pretrained, "--precision", precision, "--port", str(port)]
        begin = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )
        try:
            self._wait(begin + 180)
            self.start_s = time.perf_counter() - begin
            self.device = pytorch_health(self.url)["device"]
        except BaseException:
            self.stop()
            raise

    def _wait(self, deadline: float) -> None:
        from clip_embed import EmbeddingClient
        from clip_tools.serving.probe import probe_image

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


@dataclass(frozen=True)
class RemoteTriton:
    """A server that others run, by its gRPC URL: it is asked, and nothing of it is started, stopped or looked into."""

    url: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "grpc" or not parts.hostname or parts.path:
            raise ToolError(f"--url {self.url}: expected grpc://HOST:PORT", exit_code=2)

    @property
    def options(self) -> ServeOptions:
        """Where it listens."""
        parts = urlsplit(self.url)
        return ServeOptions(host=parts.hostname or "", grpc_port=parts.port or 8001)

    @property
    def client_options(self) -> dict[str, Any]:
        """The keys of the environment (CLIP_API_KEY)."""
        from clip_embed.credentials import environment_options

        return environment_options(os.environ)

    def stop(self) -> None:
        """It is not ours."""


class RemotePyTorch:
    """A service of `clip_tools.measuring.baseline` that others run. Raises ToolError for one in another precision."""

    def __init__(self, url: str, precision: str) -> None:
        self.url = url.rstrip("/")
        health = pytorch_health(self.url)
        if health["precision"] != precision:
            raise ToolError(f"--pytorch-url {url}: expected a service in {precision}, came {health['precision']}")
        self.device = _at(health["device"], urlsplit(url).hostname)

    def stop(self) -> None:
        """It is not ours."""


def pytorch_health(url: str) -> dict[str, str]:
    """What the PyTorch service says of itself: device ("GPU", "CPU") and precision. Raises ToolError without one."""
    try:
        import httpx
    except ImportError as error:
        raise missing_extra("http", error) from error
    try:
        said: dict[str, str] = httpx.get(f"{url}/health", timeout=10).raise_for_status().json()
        return {key: said[key] for key in ("device", "precision")}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise ToolError(
            f"{url} is no PyTorch service of this version: {type(error).__name__}: {error}; start it there with "
            "`python -m clip_tools.measuring.baseline --host HOST`"
        ) from error


def _at(device: str, host: str | None) -> str:
    """A device, with its machine where that is another one."""
    return device if host in ("localhost", "127.0.0.1", "::1") else f"{device} of {host}"


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass
class Deployment:
    """The running servers of a set of arms, one for each variant, as a context manager.

    Those of `url` and `pytorch_url` run elsewhere already. `devices` says for each arm where its model computes: "GPU",
    "CPU", or "?" where a server elsewhere does not tell us.
    """

    arms: tuple[Arm, ...]
    weights: Weights
    models: Path = MODELS
    url: str | None = None
    pytorch_url: str | None = None
    devices: dict[str, str] = field(default_factory=dict, init=False)
    _services: dict[object, Any] = field(default_factory=dict, init=False)
    _callers: dict[tuple[Arm, str], Caller] = field(default_factory=dict, init=False)

    def __enter__(self) -> "Deployment":
        try:
            for arm in self.arms:
                self.devices[arm.name] = self._device(arm)
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
        """The running service behind an arm."""
        key = arm.server
        if key not in self._services:
            if arm.kind == "pytorch":
                precision = arm.config_name or "fp32"
                remote = self.pytorch_url and RemotePyTorch(self.pytorch_url, precision)
                self._services[key] = remote or PyTorchService(self.weights, precision)
            elif self.url:
                self._services[key] = RemoteTriton(self.url)
            else:
                mates = [one for one in self.arms if one.kind != "pytorch"]
                tensors = any(
                    one.needs_tensor_model and (one.config_name, one.preprocess_instances) == key for one in mates
                )
                variant = Variant(arm.config_name, arm.preprocess_instances, with_tensor_model=tensors)
                self._services[key] = TritonService(variant, self.models)
        return self._services[key]

    def _device(self, arm: Arm) -> str:
        service = self.service(arm)
        if arm.kind == "pytorch":
            return str(service.device)
        return _at(steps.device_of(service.options.grpc_url, arm.model), service.options.host)

    def services(self) -> dict[str, Any]:
        """Each server that was started here by the name of its variant."""
        return {
            key if isinstance(key, str) else Arm("triton", *key).name: service  # type: ignore[misc]
            for key, service in self._services.items()
            if hasattr(service, "pid")
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
