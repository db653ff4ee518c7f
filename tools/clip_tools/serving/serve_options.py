"""The options of a server: what to serve, and where it listens."""

from dataclasses import dataclass, field
from pathlib import Path

from clip_tools.paths import MODELS
from clip_tools.serving.access import Access, is_loopback


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and where.

    Args:
        arguments: further flags for tritonserver.
        log: the file for tritonserver's log; None: stderr.
        rebuild_stale: build a TensorRT plan again that does not fit this machine. Without it such a plan is refused.
        check_vectors: verify the vectors against open_clip, on the export's sample, as soon as the server embeds.
        preprocess_instances: how many processes decode; None: by the machine's cores.
        open_metadata: metadata and statistics require no key; None: if the server listens on this machine alone.
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
        """tritonserver's flags that contain a key; see `Access.secret_flags`."""
        is_open = is_loopback(self.host) if self.open_metadata is None else self.open_metadata
        return self.access.secret_flags(open_metadata=is_open)

    @property
    def grpc_url(self) -> str:
        """The gRPC URL for clients on this machine."""
        scheme = "grpcs" if self.access.tls else "grpc"
        return f"{scheme}://{_url_host(self.host)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """The HTTP URL for clients on this machine."""
        return f"http://{_url_host(self.http_host)}:{self.http_port}"

    @property
    def http_host(self) -> str:
        """The address for HTTP. With TLS for gRPC it is the loopback: Triton has no HTTPS."""
        return "127.0.0.1" if self.access.tls else self.host

    @property
    def metrics_url(self) -> str:
        """The URL of the metrics."""
        return f"http://{_url_host(self.host)}:{self.metrics_port}/metrics"


def _url_host(host: str) -> str:
    """The host of a URL for clients on this machine, of a server that listens on `host`."""
    if host == "0.0.0.0":  # noqa: S104
        return "localhost"
    if host == "::":
        return "[::1]"  # Triton's HTTP listens on IPv6 alone there
    return f"[{host}]" if ":" in host else host
