"""The servers that are measured: each in processes of its own, on free ports, started once."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
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


class _Service:
    """A context manager that ends what was started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; nothing for a server that others run."""


class TritonService(_Service):
    """The embedded server of one variant, on free ports."""

    def __init__(self, variant: Variant, models: Path = MODELS) -> None:
        self._resources = contextlib.ExitStack()
        try:
            folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="clip-bench-"))
            http, grpc, metrics = free_ports(3)
            log = CACHE / "bench" / f"tritonserver-{grpc}.log"
            self._resources.callback(log.unlink, missing_ok=True)
            self.options = ServeOptions(
                models=write_repository(variant, Path(folder) / "models", models),
                config_name=variant.config_name,
                http_port=http,
                grpc_port=grpc,
                metrics_port=metrics,
                log=log,
                arguments=(f"--load-model={TENSOR_MODEL}",) if variant.with_tensor_model else (),
            )
            begin_s = time.perf_counter()
            self.pid = self._resources.enter_context(EmbeddedServer(self.options)).pid
            self.start_s = time.perf_counter() - begin_s
        except BaseException:
            self._resources.close()
            raise

    def stop(self) -> None:
        """End the server and remove its repository and its log."""
        self._resources.close()


class PyTorchService(_Service):
    """The service of `clip_tools.measuring.baseline` in a process of its own, once it has embedded an image."""

    def __init__(self, weights: Weights, precision: str = "fp32") -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "clip_tools.measuring.baseline", "--model", weights.model]
        command += ["--pretrained", weights.pretrained, "--precision", precision, "--port", str(port)]
        begin_s = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )
        self.pid = self._process.pid
        try:
            self._wait(begin_s + 180)
            self.start_s = time.perf_counter() - begin_s
            self.device = pytorch_health(self.url)["device"]
        except BaseException:
            self.stop()
            raise

    def _wait(self, deadline_s: float) -> None:
        from clip_embed import EmbeddingClient
        from clip_tools.serving.probe import probe_image

        with EmbeddingClient(self.url, backend="pytorch", timeout_s=60, retry=None) as client:
            while not client.is_ready():
                if self._process.poll() is not None or time.perf_counter() > deadline_s:
                    self._log.seek(0)
                    last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
                    raise ToolError(f"the PyTorch service did not start: {last}")
                time.sleep(0.1)
            client.embed([probe_image()])

    def stop(self) -> None:
        """End the service."""
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class RemoteTriton(_Service):
    """A server that others run, by its gRPC URL, asked with the keys of the environment (CLIP_API_KEY)."""

    def __init__(self, url: str) -> None:
        from clip_embed.credentials import environment_options

        parts = urlsplit(url)
        if parts.scheme != "grpc" or not parts.hostname or parts.path:
            raise ToolError(f"--url {url}: expected grpc://HOST:PORT", exit_code=2)
        self.options = ServeOptions(host=parts.hostname, grpc_port=parts.port or 8001)
        self.client_options = environment_options(os.environ)


class RemotePyTorch(_Service):
    """A service of `clip_tools.measuring.baseline` that others run. Raises ToolError for one in another precision."""

    def __init__(self, url: str, precision: str) -> None:
        self.url = url.rstrip("/")
        health = pytorch_health(self.url)
        if health["precision"] != precision:
            raise ToolError(f"--pytorch-url {url}: expected a service in {precision}, came {health['precision']}")
        self.device = _at(health["device"], urlsplit(url).hostname)


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

    Those of `url` and `pytorch_url` run elsewhere already. `services` are the servers by name; `devices` says for each
    arm where its model computes: "GPU", "CPU", or "?" where a server elsewhere does not tell us.
    """

    arms: tuple[Arm, ...]
    weights: Weights
    models: Path = MODELS
    url: str | None = None
    pytorch_url: str | None = None

    def __enter__(self) -> Self:
        self.services: dict[str, Any] = {}
        self.devices: dict[str, str] = {}
        self._callers: dict[tuple[Arm, str], Caller] = {}
        with contextlib.ExitStack() as stack:
            for arm in self.arms:
                if arm.server not in self.services:
                    self.services[arm.server] = stack.enter_context(self._start(arm))
                self.devices[arm.name] = self._device(arm)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, arm: Arm) -> _Service:
        if arm.kind == "pytorch":
            precision = arm.config_name or "fp32"
            return (
                RemotePyTorch(self.pytorch_url, precision)
                if self.pytorch_url
                else PyTorchService(self.weights, precision)
            )
        if self.url:
            return RemoteTriton(self.url)
        tensors = any(one.server == arm.server and one.model == TENSOR_MODEL for one in self.arms)
        return TritonService(Variant(arm.config_name, arm.preprocess_instances, with_tensor_model=tensors), self.models)

    def _device(self, arm: Arm) -> str:
        service = self.services[arm.server]
        if arm.kind == "pytorch":
            return str(service.device)
        return _at(steps.device_of(service.options.grpc_url, arm.model), service.options.host)

    def caller(self, arm: Arm, workload: Workload) -> Caller:
        """What asks the arm for a workload's images; opened once."""
        key = (arm, workload.name)
        if key not in self._callers:
            self._callers[key] = open_caller(arm, self.services[arm.server], workload)
            self._stack.callback(self._callers[key].close)
        return self._callers[key]
