"""`clip-tools serve`: the embedded server as one process to start, ask and stop."""

import contextlib
import errno
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools import kernel
from clip_tools.errors import ToolError, missing_extra
from clip_tools.paths import MODELS
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE, Model, check_files, deployment, text_deployment
from clip_tools.serving import keyring
from clip_tools.serving.access import Access, exposure, is_this_machine_alone
from clip_tools.serving.drain import drain
from clip_tools.serving.machine import Machine, write_served
from clip_tools.serving.manifests import check_manifests, check_towers
from clip_tools.serving.process import DRAIN_S, EXIT_TIMEOUT_S, TritonProcess
from clip_tools.serving.proof import WrongVectors, check_text_vectors, check_vectors
from clip_tools.serving.supervisor import Supervisor
from clip_tools.serving.told import write_told
from clip_tools.serving.towers import Towers
from clip_tools.serving.tritonserver import command, find_installation
from clip_tools.serving.watchdog import PROBE_DEADLINE_S, ImageProbe, Watchdog, decoding_cpu_s
from clip_tools.verification.engine import Engine

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clip_embed import EmbeddingClient

_CHECK_S = 30.0  # how long the sample may wait for room
PROBE_TEXT = "a photograph"
_STARTING_S = 5.0  # how long one that is told to stop before it has embedded may take; not measured


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and where. `arguments` go to tritonserver as they are; `log` None means stderr.

    `rebuild_stale` builds a TensorRT plan again that does not fit what is here; else such a plan is refused.
    `check_vectors` holds what is served to open_clip's embeddings of the export's sample before it is called ready.
    `preprocess_instances` is how many processes decode; None: by the machine.
    `open_metadata`: whether metadata and statistics need no key; None: where it listens on this machine
    alone.
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
    check_vectors: bool = False
    preprocess_instances: int | None = None
    access: Access = field(default_factory=Access)
    open_metadata: bool | None = None

    @property
    def secret_flags(self) -> dict[str, str]:
        """`Access.secret_flags` of a server that listens here."""
        is_open = is_this_machine_alone(self.host) if self.open_metadata is None else self.open_metadata
        return self.access.secret_flags(open_metadata=is_open)

    @property
    def grpc_url(self) -> str:
        """Where this machine's clients reach it."""
        scheme = "grpcs" if self.access.tls else "grpc"
        return f"{scheme}://{_reached_at(self.host)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """The same over HTTP."""
        return f"http://{_reached_at(self.http_host)}:{self.http_port}"

    @property
    def http_host(self) -> str:
        """Where HTTP listens: beside an encrypted gRPC on this machine alone, since Triton has no HTTPS."""
        return "127.0.0.1" if self.access.tls else self.host

    @property
    def metrics_url(self) -> str:
        """Its metrics."""
        return f"http://{_reached_at(self.host)}:{self.metrics_port}/metrics"


def _reached_at(host: str) -> str:
    """The host of a URL, for this machine's clients of a server that listens there."""
    if host == "0.0.0.0":  # noqa: S104
        return "localhost"
    if host == "::":
        return "[::1]"  # libevhtp takes IPv6 alone there
    return f"[{host}]" if ":" in host else host


@dataclass
class EmbeddedServer:
    """A running tritonserver that has embedded an image, as a context manager. Leaves no process behind.

    `remark` is what `check_vectors` had to say as it was entered.
    """

    options: ServeOptions
    remark: str | None = field(default=None, init=False)
    _process: TritonProcess | None = field(default=None, init=False)
    _served: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)
    embeds: bool = field(default=False, init=False)

    def __enter__(self) -> "EmbeddedServer":
        try:
            self.start()
            self.remark = self.wait_until_it_embeds()
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
        check_manifests([*models, *self._text_models])
        check_towers(models, self._text_models)
        check_plans(models, rebuild=options.rebuild_stale)
        installation = find_installation()
        check_ports(options)
        self._keep_keys()
        self._served = tempfile.TemporaryDirectory(prefix="clip-tools-served-")
        towers = Towers.of(options.models, options.config_name)
        write_served(options.models, self.served, Machine.here(options.preprocess_instances), towers)
        write_told(self.served, options.config_name)
        flags = [*repository_flags(self.served, options.config_name), *self._flags(), *options.arguments]
        self._process = TritonProcess(
            command(installation, flags),
            {**os.environ, **installation.environment},
            secrets=options.secret_flags,
            log=options.log,
        )

    @cached_property
    def _text_models(self) -> list[Model]:
        """What it loads to embed texts; none where it does not."""
        return text_deployment(self.options.models, self.options.config_name)

    def _probe(
        self, new_client: "Callable[[], EmbeddingClient]", cpu_s: Callable[[], float] = lambda: 0.0
    ) -> ImageProbe:
        texts = [PROBE_TEXT] if self._text_models else []
        return ImageProbe(new_client, probe_image(), self.options.metrics_url, cpu_s, texts)

    def _keep_keys(self) -> None:
        """For this user's `clip-tools`, until `stop`."""
        for url in (self.options.grpc_url, self.options.http_url):
            keyring.remember(url, self.options.access)

    def _flags(self) -> list[str]:
        options = self.options
        flags = options.access.flags()
        for name, host, port, ipv6 in (  # of an IPv6 address: libevhtp's way to write it, and gRPC's
            ("http", options.http_host, options.http_port, "ipv6:{}"),
            ("grpc", options.host, options.grpc_port, "[{}]"),
            ("metrics", options.host, options.metrics_port, "ipv6:{}"),
        ):
            address = ipv6.format(host) if ":" in host else host
            flags += [f"--{name}-address={address}", f"--{name}-port={port}"]
        if not Path("/dev/nvidiactl").exists():
            flags.append("--allow-gpu-metrics=false")
        return flags

    @property
    def process(self) -> TritonProcess:
        """Its tritonserver."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    @property
    def served(self) -> Path:
        """The repository that it serves: the one of its options, fitted to this machine."""
        if self._served is None:
            raise RuntimeError("the server was not started")
        return Path(self._served.name)

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return self.process.pid

    def wait_until_it_embeds(self) -> str | None:
        """Return once `clip_ensemble` embedded an image, with what `check_vectors` has to say.

        Raises ToolError when the server ends or takes too long, or does not give open_clip's vectors.
        """
        from clip_embed import DeadlineExceededError, EmbeddingError, ServerOverloadedError

        process, wrong = self.process, ""
        deadline = time.monotonic() + self.options.ready_timeout_s
        probe = self._probe(partial(self.client, timeout_s=60))
        with self.client(timeout_s=60) as client:
            while time.monotonic() < deadline:
                process.raise_if_ended()
                if process.is_stopping:
                    raise ToolError(f"the server was stopped before {ENSEMBLE} was loaded")
                if client.is_ready():
                    try:
                        probe.ask()
                        self.embeds = True
                        return self._held_to_open_clip(client) if self.options.check_vectors else None
                    except WrongVectors:
                        self.embeds = False
                        raise
                    except (ServerOverloadedError, DeadlineExceededError) as error:
                        wrong = f"{ENSEMBLE} is loaded and has no room: {error}; "  # others have waited for it
                    except EmbeddingError as error:
                        process.raise_if_ended()
                        raise ToolError(f"{ENSEMBLE} is loaded but does not embed: {error}") from error
                time.sleep(0.1)
        raise ToolError(
            f"{wrong}the server was not ready after {self.options.ready_timeout_s:.0f} s; its last words: "
            + process.last_words()
        )

    def _held_to_open_clip(self, client: "EmbeddingClient") -> str:
        """How near its vectors are, in words. Raises ToolError when they are under the gate.

        Others may be waiting for it too, so that there is not always room.
        """
        import numpy as np

        from clip_embed import DeadlineExceededError, InvalidImageError, ServerOverloadedError

        deadline = time.monotonic() + _CHECK_S

        def embed_one(embed: "Callable[[list[Any]], npt.NDArray[np.float32]]", one: Any) -> "npt.NDArray[np.float32]":
            while True:
                try:
                    return embed([one])
                except (ServerOverloadedError, DeadlineExceededError):
                    if time.monotonic() > deadline:
                        raise
                if self.process.is_stopping:
                    raise ToolError("the server was stopped before its vectors were held to open_clip's")
                time.sleep(0.1)

        try:
            said = check_vectors(
                Engine(models=self.options.models, config_name=self.options.config_name),
                lambda sample: np.concatenate([embed_one(client.embed, image) for image in sample.files]),
            )
            if not self._text_models:
                return said
            return f"{said}; of texts, " + check_text_vectors(
                self._text_models,
                lambda sample: np.concatenate([embed_one(client.embed_text, one.decode()) for one in sample.files]),
            )
        except (ServerOverloadedError, DeadlineExceededError, InvalidImageError) as error:
            return f"its vectors were not held to open_clip's: {error}"

    def watchdog(self) -> Watchdog:
        """What tells when it no longer embeds."""
        new_client = partial(self.client, timeout_s=PROBE_DEADLINE_S)
        return Watchdog(self.pid, self._probe(new_client, partial(decoding_cpu_s, self.pid)))

    def client(self, *, timeout_s: float) -> "EmbeddingClient":
        """A client of this server, which asks once."""
        try:
            from clip_embed import EmbeddingClient
        except ImportError as error:
            raise missing_extra("server", error) from error
        access = self.options.access
        # Encrypted, the certificate need not be this machine's own name's, and there may be none for us.
        url, api_key = self.options.grpc_url, access.api_key
        if access.tls:
            url, api_key = self.options.http_url, access.http_key or access.api_key
        return EmbeddingClient(url, timeout_s=timeout_s, retry=None, api_key=api_key)

    def terminate(self) -> None:
        """Ask the server to finish what is in flight and end; a second time: kill it."""
        if self._process is not None:
            drain_s, limit_s = (DRAIN_S, EXIT_TIMEOUT_S) if self.embeds else (_STARTING_S, _STARTING_S)
            headers = self.options.access.http_headers()
            self._process.terminate(partial(drain, self.options.http_url, headers, drain_s), limit_s=limit_s)

    def stop(self, *, is_broken: bool = False) -> None:
        """End the server and everything it started. Safe to call twice; see `TritonProcess.stop`."""
        if self._process is not None:
            if not (is_broken or self._process.is_stopping):
                self.terminate()
            self._process.stop(is_broken=is_broken)
            for url in (self.options.grpc_url, self.options.http_url):
                keyring.forget(url, self.options.access)
        if self._served is not None:
            self._served.cleanup()


def repository_flags(models: Path, config_name: str | None) -> list[str]:
    """tritonserver's flags for a repository, also in the container."""
    flags = [
        f"--model-repository={models}",
        # Explicit: only what the ensembles need is loaded, and `clip-tools swap` can change it.
        "--model-control-mode=explicit",
        f"--load-model={ENSEMBLE}",
        *([f"--load-model={TEXT_ENSEMBLE}"] if text_deployment(models, config_name) else []),
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        "--metrics-config=summary_latencies=true",  # percentiles in /metrics
    ]
    return [*flags, f"--model-config-name={config_name}"] if config_name else flags


def check_plans(models: Sequence[Model], *, rebuild: bool = False) -> None:
    """Raises ToolError for a plan that was built for something else than is here, or builds it again."""
    from clip_tools.tensorrt.build_engine import build_engine, stale_reason
    from clip_tools.tensorrt.engine_manifest import EngineManifest, EngineOptions

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
    for title, flag, host, port in (
        ("HTTP", "--http-port", options.http_host, options.http_port),
        ("gRPC", "--grpc-port", options.host, options.grpc_port),
        ("metrics", "--metrics-port", options.host, options.metrics_port),
    ):
        _check_port(host, port, title, flag)


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


def warning_if_untrained(options: ServeOptions) -> str:
    """A line for whoever would fill an index with vectors that mean nothing; empty for trained weights."""
    from clip_tools.export.manifest import Manifest

    file = deployment(options.models, options.config_name)[-2].file
    manifest = Manifest.read(file) if file else None
    if manifest is None or manifest.trained:
        return ""
    return f"UNTRAINED WEIGHTS ({manifest.pretrained}): the vectors mean nothing; export trained ones to keep any\n"


def serve(options: ServeOptions) -> None:
    """Serve in the foreground until a signal comes. Raises ToolError when the server cannot start."""
    decoders = Machine.here(options.preprocess_instances).decoders(options.models, options.config_name)
    ready_line = (
        f"{ENSEMBLE} embeds at {options.grpc_url} and {options.http_url} (metrics on port {options.metrics_port}), "
        f"{decoders}; Ctrl-C stops it\n{warning_if_untrained(options)}"
    ).strip()
    if warning := exposure(options.host, options.access):
        sys.stderr.write(f"clip-tools: {warning}\n")
    if not kernel.library(source := kernel.IGNORE_CANCELLATION).is_file():
        sys.stderr.write(f"clip-tools: {kernel.WITHOUT[source]}: {source.name} is not built; run `make setup`\n")
    supervisor = Supervisor(
        lambda: EmbeddedServer(options), lambda line: sys.stderr.write(f"clip-tools: {line}\n"), ready_line
    )
    with supervisor.stopping_on_signals():
        supervisor.run()
