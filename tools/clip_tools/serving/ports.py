"""Checks the server's ports before it starts."""

import contextlib
import errno
import socket

from clip_tools.errors import ToolError
from clip_tools.serving.serve_options import ServeOptions


def check_ports(options: ServeOptions) -> None:
    """Raises ToolError if two ports are equal, a port is in use, or the address is not of this machine."""
    if len({options.http_port, options.grpc_port, options.metrics_port}) < 3:
        raise ToolError(
            f"expected three different ports, got --http-port {options.http_port}, --grpc-port {options.grpc_port}, "
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
                raise ToolError(
                    f"--host {host} is not an address of this machine; 127.0.0.1 is for this machine alone"
                ) from error
            raise ToolError(
                f"port {port} ({title}) on {host} cannot be used: {error.strerror}{_owner(port)}; "
                f"stop that program, or choose another port with {flag}"
            ) from error


def _owner(port: int) -> str:
    """The process that listens on the port, if the system tells."""
    with contextlib.suppress(Exception):
        import psutil

        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""
