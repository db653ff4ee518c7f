"""The embedded server: starts tritonserver on the model repository, waits until it embeds, and stops it."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.errors import ToolError, needs_extra
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE, Model, check_files, deployment, text_deployment
from clip_tools.serving import key_files
from clip_tools.serving.drain import drain
from clip_tools.serving.engine import Engine
from clip_tools.serving.machine import Machine
from clip_tools.serving.manifests import check_manifests, check_plans, check_towers
from clip_tools.serving.ports import check_ports
from clip_tools.serving.probe import PROBE_TEXT, ImageProbe, probe_image, retry_while_full
from clip_tools.serving.process import DRAIN_S, EXIT_TIMEOUT_S, TritonProcess
from clip_tools.serving.provenance import write_provenance
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.served_repository import write_served_repository
from clip_tools.serving.towers import Towers
from clip_tools.serving.tritonserver import command, find_installation
from clip_tools.serving.vector_check import NOT_VERIFIED, WrongVectors, check_text_vectors, check_vectors
from clip_tools.serving.watchdog import PROBE_DEADLINE_S, Watchdog, decoding_cpu_s

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clip_embed import EmbeddingClient

_CHECK_S = 30.0  # how long the sample may wait for room in the queues
_STARTING_S = 5.0  # how long a stop may take before the server is ready; not measured


@dataclass
class EmbeddedServer:
    """A tritonserver on this machine, as a context manager that is ready when entered. Leaves no process behind.

    `check_result` is the line of `check_vectors`; None without that option.
    """

    options: ServeOptions
    check_result: str | None = field(default=None, init=False)
    _process: TritonProcess | None = field(default=None, init=False)
    _served: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)
    is_ready: bool = field(default=False, init=False)

    def __enter__(self) -> "EmbeddedServer":
        try:
            self.start()
            self.check_result = self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process. Raises ToolError if files, ports or the environment are wrong."""
        options = self.options
        models = deployment(options.models, options.config_name)
        check_files(models)
        check_manifests([*models, *self._text_models])
        check_towers(models, self._text_models)
        check_plans(models, rebuild=options.rebuild_stale)
        installation = find_installation()
        check_ports(options)
        self._save_keys()
        self._served = tempfile.TemporaryDirectory(prefix="clip-tools-served-")
        towers = Towers.of(options.models, options.config_name)
        write_served_repository(options.models, self.served, Machine.here(options.preprocess_instances), towers)
        write_provenance(self.served, options.config_name)
        flags = [*repository_flags(self.served, options.config_name), *self._flags(), *options.arguments]
        self._process = TritonProcess(
            command(installation, flags),
            {**os.environ, **installation.environment},
            secrets=options.secret_flags,
            log=options.log,
        )

    @cached_property
    def _text_models(self) -> list[Model]:
        """The models of the text tower; none without one."""
        return text_deployment(self.options.models, self.options.config_name)

    def _probe(
        self, new_client: "Callable[[], EmbeddingClient]", cpu_s: Callable[[], float] = lambda: 0.0
    ) -> ImageProbe:
        texts = [PROBE_TEXT] if self._text_models else []
        return ImageProbe(new_client, probe_image(), self.options.metrics_url, cpu_s, texts)

    def _save_keys(self) -> None:
        """Save the keys for this user's `clip-tools`, until `stop`."""
        for url in (self.options.grpc_url, self.options.http_url):
            key_files.save_keys(url, self.options.access)

    def _flags(self) -> list[str]:
        options = self.options
        flags = options.access.flags()
        for name, host, port, ipv6 in (  # the form of an IPv6 address
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
        """The process of tritonserver."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    @property
    def served(self) -> Path:
        """The repository that is served, adapted to this machine."""
        if self._served is None:
            raise RuntimeError("the server was not started")
        return Path(self._served.name)

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return self.process.pid

    def wait_until_ready(self) -> str | None:
        """Return when `clip_ensemble` has embedded an image, with the result of `check_vectors`.

        Raises ToolError if the server ends, takes too long, or its vectors do not match open_clip's.
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
                        self.is_ready = True
                        return self._verify_sample(client) if self.options.check_vectors else None
                    except WrongVectors:
                        self.is_ready = False
                        raise
                    except (ServerOverloadedError, DeadlineExceededError) as error:
                        wrong = f"{ENSEMBLE} is loaded but busy: {error}; "  # with clients that waited for it
                    except EmbeddingError as error:
                        process.raise_if_ended()
                        raise ToolError(f"{ENSEMBLE} is loaded but does not embed: {error}") from error
                time.sleep(0.1)
        raise ToolError(
            f"{wrong}the server was not ready after {self.options.ready_timeout_s:.0f} s; its log says: "
            + process.log_reason()
        )

    def _verify_sample(self, client: "EmbeddingClient") -> str:
        """One line: how close its vectors are to open_clip's. Raises WrongVectors."""
        import numpy as np

        from clip_embed import DeadlineExceededError, InvalidImageError, ServerOverloadedError

        full = (ServerOverloadedError, DeadlineExceededError)  # other clients may have filled the queues
        deadline = time.monotonic() + _CHECK_S

        def raise_if_stopping() -> None:
            if self.process.is_stopping:
                raise ToolError("the server was stopped before its vectors were verified")

        def embed_each(embed: "Callable[[list[Any]], npt.NDArray[np.float32]]", each: Iterable[Any]) -> Any:
            return np.concatenate(
                [
                    retry_while_full(
                        partial(embed, [one]),
                        full,
                        limit_s=deadline - time.monotonic(),
                        before_retry=raise_if_stopping,
                    )
                    for one in each
                ]
            )

        try:
            result = check_vectors(
                Engine(models=self.options.models, config_name=self.options.config_name),
                lambda sample: embed_each(client.embed, sample.files),
            )
            if not self._text_models:
                return result
            return f"{result}; for texts, " + check_text_vectors(
                self._text_models, lambda sample: embed_each(client.embed_text, map(bytes.decode, sample.files))
            )
        except (*full, InvalidImageError) as error:
            return f"{NOT_VERIFIED}: {error}"

    def watchdog(self) -> Watchdog:
        """Watches whether it still embeds."""
        new_client = partial(self.client, timeout_s=PROBE_DEADLINE_S)
        return Watchdog(self.pid, self._probe(new_client, partial(decoding_cpu_s, self.pid)))

    def client(self, *, timeout_s: float) -> "EmbeddingClient":
        """A client of this server, without retries."""
        with needs_extra("server"):
            from clip_embed import EmbeddingClient
        access = self.options.access
        # With TLS, over HTTP: gRPC's certificate may be for another name, and we may have no client certificate.
        url, api_key = self.options.grpc_url, access.api_key
        if access.tls:
            url, api_key = self.options.http_url, access.http_key or access.api_key
        return EmbeddingClient(url, timeout_s=timeout_s, retry=None, api_key=api_key)

    def terminate(self) -> None:
        """Ask the server to answer what is in flight and end; called again, kill it."""
        if self._process is not None:
            drain_s, limit_s = (DRAIN_S, EXIT_TIMEOUT_S) if self.is_ready else (_STARTING_S, _STARTING_S)
            headers = self.options.access.http_headers()
            self._process.terminate(partial(drain, self.options.http_url, headers, drain_s), limit_s=limit_s)

    def stop(self, *, is_broken: bool = False) -> None:
        """End the server and all its processes. Safe to call twice; see `TritonProcess.stop`."""
        if self._process is not None:
            if not (is_broken or self._process.is_stopping):
                self.terminate()
            self._process.stop(is_broken=is_broken)
            for url in (self.options.grpc_url, self.options.http_url):
                key_files.remove_keys(url, self.options.access)
        if self._served is not None:
            self._served.cleanup()


def repository_flags(models: Path, config_name: str | None) -> list[str]:
    """tritonserver's flags for a repository; the container uses them too."""
    flags = [
        f"--model-repository={models}",
        # Loads only the models of the ensembles, and lets `clip-tools swap` load others.
        "--model-control-mode=explicit",
        f"--load-model={ENSEMBLE}",
        # The configurations are complete. To complete one, Triton would start each Python model twice.
        "--disable-auto-complete-config",
        *([f"--load-model={TEXT_ENSEMBLE}"] if text_deployment(models, config_name) else []),
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        "--metrics-config=summary_latencies=true",  # percentiles in /metrics
    ]
    return [*flags, f"--model-config-name={config_name}"] if config_name else flags
