"""`clip-tools serve`: the embedded server as one process to start, ask and stop."""

import contextlib
import ctypes
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import IO

from clip_tools.errors import ToolError, missing_extra
from clip_tools.paths import MODELS
from clip_tools.repository import ENSEMBLE, Model, check_files, deployment
from clip_tools.serving.tritonserver import command, find_installation

_EXIT_TIMEOUT_S = 30  # Triton's own default: how long it waits for requests in flight
_LOG_LINES_KEPT = 2000  # tritonserver's own help, printed after a bad flag, has over 500
_PYTHON_BACKENDS = ("python", "onnxruntime", "tensorrt")

# The lines of the log that say why it ended, the most telling first.
_REASONS = tuple(
    map(
        re.compile,
        (
            r"^E.*failed to load '.*?' version \d+: (?:\w+: )?(.*)",
            r"error: (.*)",
            r"(unrecognized option .*)",
            r"^E.*?\] (.*)",
        ),
    )
)


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and where. `arguments` go to tritonserver as they are; `log` None means stderr.

    `rebuild_stale` builds a TensorRT plan again that does not fit what is here; else such a plan is refused.
    """

    models: Path = MODELS
    config_name: str | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    ready_timeout_s: float = 180.0
    arguments: tuple[str, ...] = ()
    log: Path | None = None
    rebuild_stale: bool = False

    @property
    def grpc_url(self) -> str:
        """Where this machine's clients reach it."""
        return f"grpc://{'localhost' if self.host in ('0.0.0.0', '::') else self.host}:{self.grpc_port}"  # noqa: S104

    @property
    def http_url(self) -> str:
        """The same over HTTP."""
        return f"http://{'localhost' if self.host in ('0.0.0.0', '::') else self.host}:{self.http_port}"  # noqa: S104


@dataclass
class EmbeddedServer:
    """A running tritonserver that has embedded an image, as a context manager. Leaves no process behind."""

    options: ServeOptions
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _tail: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES_KEPT), init=False)
    _reader: threading.Thread | None = field(default=None, init=False)
    _stopping: bool = field(default=False, init=False)

    def __enter__(self) -> "EmbeddedServer":
        try:
            self.start()
            self.wait_until_it_embeds()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process. Raises ToolError for what would make it fail: files, ports, environment."""
        options = self.options
        models = deployment(options.models, options.config_name)
        check_files(models)
        check_plans(models, rebuild=options.rebuild_stale)
        installation = find_installation()
        check_ports(options)
        self._process = subprocess.Popen(
            command(installation, [*self._flags(), *options.arguments]),
            env={**os.environ, **installation.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
            preexec_fn=_die_with_parent,  # noqa: PLW1509
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _flags(self) -> list[str]:
        options = self.options
        flags = [
            f"--model-repository={options.models}",
            # Explicit: only what the ensemble needs is loaded, and `clip-tools swap` can change it.
            "--model-control-mode=explicit",
            f"--load-model={ENSEMBLE}",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
        ]
        for name, port in (("http", options.http_port), ("grpc", options.grpc_port), ("metrics", options.metrics_port)):
            flags += [f"--{name}-address={options.host}", f"--{name}-port={port}"]
        if options.config_name:
            flags.append(f"--model-config-name={options.config_name}")
        if not Path("/dev/nvidiactl").exists():
            flags.append("--allow-gpu-metrics=false")
        # A prefix of our own, so that shared memory left by a killed stub can be found and removed.
        flags += [f"--backend-config={b},shm-region-prefix-name={self._shm_prefix}" for b in _PYTHON_BACKENDS]
        return flags

    @property
    def _shm_prefix(self) -> str:
        return f"clip_tools_{os.getpid()}_{id(self):x}_"

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.pid

    def wait_until_it_embeds(self) -> None:
        """Return once `clip_ensemble` embedded an image. Raises ToolError when the server ends or takes too long."""
        try:
            from clip_embed import EmbeddingClient, EmbeddingError
        except ImportError as error:
            raise missing_extra("server", error) from error
        image = probe_image()
        deadline = time.monotonic() + self.options.ready_timeout_s
        with EmbeddingClient(self.options.grpc_url, timeout_s=60, retry=None) as client:
            while time.monotonic() < deadline:
                self._raise_if_ended()
                if self._stopping:
                    raise ToolError(f"the server was stopped before {ENSEMBLE} was loaded")
                if client.is_ready():
                    try:
                        client.embed([image])
                        return
                    except EmbeddingError as error:
                        raise ToolError(f"{ENSEMBLE} is loaded but does not embed: {error}") from error
                time.sleep(0.1)
        raise ToolError(
            f"the server was not ready after {self.options.ready_timeout_s:.0f} s; its last words: {self._reason()}"
        )

    def _raise_if_ended(self) -> None:
        process = self._process
        if process is not None and process.poll() is not None and not self._stopping:
            if self._reader:
                self._reader.join(timeout=5)
            raise ToolError(f"tritonserver ended with exit code {process.returncode}: {self._reason()}")

    def wait(self) -> None:
        """Return when the server ended because it was asked to. Raises ToolError when it ended by itself."""
        if self._process is not None:
            self._process.wait()
            self._raise_if_ended()

    def terminate(self) -> None:
        """Ask the server to finish what is in flight and end; a second time: kill it."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if self._stopping:
            _kill_group(process.pid)
        else:
            self._stopping = True
            process.terminate()

    def stop(self) -> None:
        """End the server and everything it started. Safe to call twice."""
        process = self._process
        if process is None:
            return
        if not self._stopping:
            self.terminate()
        try:
            process.wait(timeout=_EXIT_TIMEOUT_S + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_group(process.pid)  # a stub can outlive a server that was killed
            process.wait()
            if self._reader:
                self._reader.join(timeout=5)
            for region in Path("/dev/shm").glob(self._shm_prefix + "*"):  # noqa: S108
                region.unlink(missing_ok=True)

    def _read_log(self, stream: IO[str]) -> None:
        log = self.options.log
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with stream, log.open("w") if log else contextlib.nullcontext(sys.stderr) as sink:
            for line in stream:
                self._tail.append(line)
                with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop the reading
                    sink.write(line)
                    sink.flush()

    def _reason(self) -> str:
        return self._last_words() + (f" (its log: {self.options.log})" if self.options.log else "")

    def _last_words(self) -> str:
        """The line of the log that says why, as well as it can be found."""
        lines = [line for line in self._tail if line.strip()]
        for reason in _REASONS:
            for line in lines:
                if found := reason.search(line):
                    return found[1].strip().strip('"')
        return lines[-1].strip() if lines else "nothing was logged"


def check_plans(models: Sequence[Model], *, rebuild: bool = False) -> None:
    """Raises ToolError for a plan that was built for something else than is here, or builds it again."""
    from clip_tools.engines.build_engine import build_engine, stale_reason
    from clip_tools.engines.engine_manifest import EngineManifest, EngineOptions

    for model in models:
        plan = model.file
        if plan is None or model.config.backend != "tensorrt" or (reason := stale_reason(plan)) is None:
            continue
        if not rebuild:
            raise ToolError(f"{model.name}: {reason}, or let `clip-tools serve --rebuild-stale` do it")
        sys.stderr.write(f"{model.name}: {reason}; building it now\n")
        manifest = EngineManifest.read(plan)
        options = manifest.options if manifest else EngineOptions()
        onnx = manifest.onnx if manifest else "model.fp16.onnx"
        build_engine(plan.parents[2] / "clip_onnx" / "1" / onnx, plan, options)


def probe_image() -> bytes:
    """A small valid JPEG, to ask a server whether it embeds."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("server", error) from error
    buffer = BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


def check_ports(options: ServeOptions) -> None:
    """Raises ToolError when two ports are one, something listens on one, or the address is not this machine's."""
    if len({options.http_port, options.grpc_port, options.metrics_port}) < 3:
        raise ToolError(
            f"expected three different ports, came --http-port {options.http_port}, --grpc-port {options.grpc_port}, "
            f"--metrics-port {options.metrics_port}",
            exit_code=2,
        )
    for title, flag, port in (
        ("HTTP", "--http-port", options.http_port),
        ("gRPC", "--grpc-port", options.grpc_port),
        ("metrics", "--metrics-port", options.metrics_port),
    ):
        _check_port(options.host, port, title, flag)


def _check_port(host: str, port: int, title: str, flag: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ToolError(f"--host {host} is no address of this machine: 127.0.0.1 is for it alone") from error
            raise ToolError(
                f"port {port} ({title}) on {host} cannot be used: {error.strerror}{_owner(port)}; "
                f"stop what holds it, or choose another with {flag}"
            ) from error


def _owner(port: int) -> str:
    """Who listens on the port, where the system tells."""
    with contextlib.suppress(Exception):
        import psutil

        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


def _die_with_parent() -> None:
    """Runs in the child: it gets SIGTERM when this process is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def _forwarding_signals(server: EmbeddedServer) -> Iterator[None]:
    def forward(_signal: int, _frame: FrameType | None) -> None:
        server.terminate()

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _warning_if_untrained(options: ServeOptions) -> str:
    """A line for whoever would fill an index with vectors that mean nothing; empty for trained weights."""
    from clip_tools.engines.export_onnx import Manifest

    file = deployment(options.models, options.config_name)[-2].file
    manifest = Manifest.read(file) if file else None
    if manifest is None or manifest.trained:
        return ""
    return f"UNTRAINED WEIGHTS ({manifest.pretrained}): the vectors mean nothing; export trained ones to keep any\n"


def serve(options: ServeOptions) -> None:
    """Serve in the foreground until a signal comes. Raises ToolError when the server cannot start or ends by itself."""
    server = EmbeddedServer(options)
    with _forwarding_signals(server):
        started = time.monotonic()
        try:
            server.start()
            server.wait_until_it_embeds()
            if not server._stopping:
                sys.stderr.write(
                    f"ready after {time.monotonic() - started:.1f} s: {ENSEMBLE} embeds at {options.grpc_url} "
                    f"and {options.http_url} (metrics on port {options.metrics_port}); Ctrl-C stops it\n"
                )
                sys.stderr.write(_warning_if_untrained(options))
            server.wait()
        except ToolError:
            if not server._stopping:
                raise
        finally:
            server.stop()
