"""The container's server: the tritonserver of its image, with the prepared command line."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clip_tools.container.settings import USAGE
from clip_tools.errors import ToolError
from clip_tools.serving.access import Access
from clip_tools.serving.process import TritonProcess
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer

_PORTS = {"http": "8000", "grpc": "8001", "metrics": "8002"}  # Triton's own
READY_TIMEOUT_S = 3600.0  # ort-trt builds an engine for each batch while it loads; not measured


@dataclass
class ContainerServer(EmbeddedServer):
    """Runs `command`. `options` describe what it serves, and where it listens."""

    command: Sequence[str] = ()

    def start(self) -> None:
        """Start the process. The entry point has checked the files."""
        reap_orphans()
        self._save_keys()
        self._process = TritonProcess(self.command, os.environ, secrets=self.options.secret_flags)


def options_in(command: Sequence[str], keys: Mapping[str, str] | None = None) -> ServeOptions:
    """The addresses and ports of a tritonserver with this command line: its flags, and Triton's defaults.

    Raises ToolError for an invalid port, and for TLS flags: the container's health check connects without TLS.
    """
    flags = flags_in(command)
    ports = {name: flags.get(f"{name}-port", default) for name, default in _PORTS.items()}
    for name, port in ports.items():
        if not (port.isascii() and port.isdigit()):
            raise ToolError(f"--{name}-port: expected a whole number, got '{port}'", exit_code=USAGE)
    for name in ("grpc-use-ssl", "grpc-use-ssl-mutual"):
        if name in flags:
            raise ToolError(
                f"--{name}: TLS of tritonserver itself is not supported in the container; put the nginx of "
                "deploy/compose.tls.yaml in front",
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
    """The flags by name, from `--name=value` and `--name value`. The last one of a name wins, as in Triton."""
    flags = {}
    for word, following in zip(command, [*command[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = value if equals else following
    return flags


def reap_orphans() -> None:
    """Reap the ended children of an earlier server, which process 1 inherits."""
    if os.getpid() == 1:
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass
