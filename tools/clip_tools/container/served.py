"""The container's tritonserver: the image's own, with the command line that the start made, watched as `serve` does."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clip_tools.container.settings import USAGE
from clip_tools.errors import ToolError
from clip_tools.serving.access import Access
from clip_tools.serving.process import TritonProcess
from clip_tools.serving.serve import EmbeddedServer, ServeOptions

_PORTS = {"http": "8000", "grpc": "8001", "metrics": "8002"}  # Triton's own
READY_TIMEOUT_S = 3600.0  # ort-trt builds an engine for each batch while it loads; not measured


@dataclass
class ContainerServer(EmbeddedServer):
    """`options` say where `command` lets it listen, and what it serves."""

    command: Sequence[str] = ()

    def start(self) -> None:
        """Start the process. What was prepared has been checked."""
        reap_orphans()
        self._keep_keys()
        self._process = TritonProcess(self.command, os.environ, secrets=self.options.secret_flags)


def options_in(command: Sequence[str], keys: Mapping[str, str] | None = None) -> ServeOptions:
    """Where a tritonserver with this command line listens: what its flags say, and Triton's own defaults.

    Raises ToolError for a port that is none, and for TLS: the container's own health check asks without.
    """
    flags = flags_in(command)
    ports = {name: flags.get(f"{name}-port", default) for name, default in _PORTS.items()}
    for name, port in ports.items():
        if not (port.isascii() and port.isdigit()):
            raise ToolError(f"--{name}-port: expected a whole number, came '{port}'", exit_code=USAGE)
    for name in ("grpc-use-ssl", "grpc-use-ssl-mutual"):
        if name in flags:
            raise ToolError(
                f"--{name}: expected no TLS of tritonserver itself in the container; put the nginx of "
                "deploy/compose.tls.yaml before it",
                exit_code=USAGE,
            )
    return ServeOptions(
        host=flags.get("grpc-address", "0.0.0.0").strip("[]"),  # noqa: S104  gRPC brackets an IPv6 address
        http_port=int(ports["http"]),
        grpc_port=int(ports["grpc"]),
        metrics_port=int(ports["metrics"]),
        ready_timeout_s=READY_TIMEOUT_S,
        access=Access(**(keys or {}), tls=None),
    )


def flags_in(command: Sequence[str]) -> Mapping[str, str]:
    """`--name=value` and `--name value` by name; the last one of a name counts, as in Triton."""
    flags = {}
    for word, following in zip(command, [*command[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = value if equals else following
    return flags


def reap_orphans() -> None:
    """Take in the ends of an earlier server's children, which as process 1 we inherit."""
    if os.getpid() == 1:
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass
