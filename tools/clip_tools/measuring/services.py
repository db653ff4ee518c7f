"""Starts the servers that are measured, each in other processes and on free ports, and reaches running ones."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from clip_embed import EmbeddingClient
from clip_embed.credentials import environment_options
from clip_tools.errors import ToolError, needs_extra
from clip_tools.measuring import steps
from clip_tools.measuring.arms import Arm, Caller, open_caller
from clip_tools.measuring.variants import TENSOR_MODEL, Variant, write_repository
from clip_tools.measuring.workload import Workload
from clip_tools.oracle import Weights
from clip_tools.paths import CACHE, MODELS
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer


@dataclass(frozen=True)
class Service:
    """A running server: Triton by its gRPC URL, or the PyTorch service.

    `pid` and `start_s`, the seconds until it was ready, are 0 for a server that others run. `client_options` are what a
    client needs for it.
    """

    url: str
    http_url: str = ""
    metrics_url: str = ""
    pid: int = 0
    start_s: float = 0.0
    client_options: dict[str, Any] = field(default_factory=dict)


@contextmanager
def triton_service(variant: Variant, models: Path = MODELS) -> Iterator[Service]:
    """The embedded server of one variant, on free ports."""
    http, grpc, metrics = free_ports(3)
    log = CACHE / "bench" / f"tritonserver-{grpc}.log"
    with ExitStack() as stack:
        stack.callback(log.unlink, missing_ok=True)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="clip-bench-"))
        options = ServeOptions(
            models=write_repository(variant, Path(folder) / "models", models),
            config_name=variant.config_name,
            http_port=http,
            grpc_port=grpc,
            metrics_port=metrics,
            log=log,
            arguments=(f"--load-model={TENSOR_MODEL}",) if variant.with_tensor_model else (),
        )
        begin_s = time.perf_counter()
        pid = stack.enter_context(EmbeddedServer(options)).pid
        start_s = time.perf_counter() - begin_s
        yield Service(options.grpc_url, options.http_url, options.metrics_url, pid, start_s)


@contextmanager
def pytorch_service(weights: Weights, precision: str = "fp32") -> Iterator[Service]:
    """The service of `clip_tools.measuring.baseline` in its own process, once it has embedded an image."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "clip_tools.measuring.baseline", "--model", weights.model]
    command += ["--pretrained", weights.pretrained, "--precision", precision, "--port", str(port)]
    begin_s = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            _wait(url, process, log, begin_s + 180)
            yield Service(url, url, pid=process.pid, start_s=time.perf_counter() - begin_s)
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(url: str, process: subprocess.Popen[bytes], log: IO[str], deadline_s: float) -> None:
    from clip_tools.serving.probe import probe_image

    with EmbeddingClient(url, backend="pytorch", timeout_s=60, retry=None) as client:
        while not client.is_ready():
            if process.poll() is not None or time.perf_counter() > deadline_s:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it said nothing"])[-1]
                raise ToolError(f"the PyTorch service did not start: {last}")
            time.sleep(0.1)
        client.embed([probe_image()])


def remote_triton(url: str) -> Service:
    """A server that others run, asked with the keys of the environment (CLIP_API_KEY)."""
    parts = urlsplit(url)
    if parts.scheme != "grpc" or not parts.hostname or parts.path:
        raise ToolError(f"--url {url}: expected grpc://HOST:PORT", exit_code=2)
    url = ServeOptions(host=parts.hostname, grpc_port=parts.port or 8001).grpc_url
    return Service(url, client_options=environment_options(os.environ))


def remote_pytorch(url: str, precision: str) -> Service:
    """A service of `clip_tools.measuring.baseline` that others run. Raises ToolError for one in another precision."""
    url = url.rstrip("/")
    if (found := pytorch_health(url)["precision"]) != precision:
        raise ToolError(f"--pytorch-url {url}: expected a service in {precision}, came {found}")
    return Service(url, url)


def served(url: str | None, variant: Variant, models: Path = MODELS) -> AbstractContextManager[Service]:
    """The Triton server at a URL, or one that is started for the variant."""
    return nullcontext(remote_triton(url)) if url else triton_service(variant, models)


def pytorch_health(url: str) -> dict[str, str]:
    """What the PyTorch service says of itself: device ("GPU", "CPU") and precision. Raises ToolError without one."""
    with needs_extra("http"):
        import httpx
    try:
        said: dict[str, str] = httpx.get(f"{url}/health", timeout=10).raise_for_status().json()
        return {key: said[key] for key in ("device", "precision")}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise ToolError(
            f"{url} is no PyTorch service of this version: {type(error).__name__}: {error}; start it there with "
            "`python -m clip_tools.measuring.baseline --host HOST`"
        ) from error


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass(frozen=True)
class Deployment:
    """The running servers of a set of arms, by `Arm.server`, and the clients that were opened for them."""

    services: dict[str, Service]
    _stack: ExitStack
    _callers: dict[tuple[Arm, str], Caller] = field(default_factory=dict)

    def device(self, arm: Arm) -> str:
        """Where the arm's model computes: "GPU", "CPU", or "?" where a server elsewhere does not tell us."""
        url = self.services[arm.server].url
        device = pytorch_health(url)["device"] if arm.kind == "pytorch" else steps.device_of(url, arm.model)
        host = urlsplit(url).hostname
        return device if host in ("localhost", "127.0.0.1", "::1") else f"{device} of {host}"

    def caller(self, arm: Arm, workload: Workload) -> Caller:
        """The client that sends a workload's images to the arm; opened once."""
        key = (arm, workload.name)
        if key not in self._callers:
            self._callers[key] = open_caller(arm, self.services[arm.server], workload, self._stack)
        return self._callers[key]


@contextmanager
def deployed(
    arms: Sequence[Arm],
    weights: Weights,
    models: Path = MODELS,
    *,
    url: str | None = None,
    pytorch_url: str | None = None,
) -> Iterator[Deployment]:
    """Start the servers of these arms, one for each variant; those at `url` and `pytorch_url` run already."""

    def running(arm: Arm) -> AbstractContextManager[Service]:
        if arm.kind == "pytorch":
            precision = arm.config_name or "fp32"
            if pytorch_url:
                return nullcontext(remote_pytorch(pytorch_url, precision))
            return pytorch_service(weights, precision)
        tensors = any(one.server == arm.server and one.model == TENSOR_MODEL for one in arms)
        return served(url, Variant(arm.config_name, arm.preprocess_instances, with_tensor_model=tensors), models)

    services: dict[str, Service] = {}
    with ExitStack() as stack:
        for arm in arms:
            if arm.server not in services:
                services[arm.server] = stack.enter_context(running(arm))
        yield Deployment(services, stack)
