"""What the commands share: server options, messages on stderr, and exit codes."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from clip_embed.client import EmbeddingClient
from clip_embed.credentials import API_KEY_VARIABLE, CA_FILE_VARIABLE, CERT_FILE_VARIABLE, KEY_FILE_VARIABLE
from clip_embed.endpoint import BACKEND_VARIABLE, URL_VARIABLE, Backend
from clip_embed.errors import ContractError, CredentialsError, ModelNotReadyError, ServerUnavailableError
from clip_embed.names import printable
from clip_embed.server_info import ServerInfo
from clip_embed.servers import READY_AGAIN
from clip_embed.wire import TEXT_MODEL

SOME_FAILED, USAGE, NO_SERVER, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141
# Errors that all other images would meet too.
FATAL_ERRORS = (ServerUnavailableError, ModelNotReadyError, CredentialsError, ContractError)

_log = logging.getLogger("clip_embed")

Url = Annotated[
    str,
    typer.Option(envvar=URL_VARIABLE, help="The server: grpc(s):// or http(s)://. Separate several with commas."),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        envvar=CA_FILE_VARIABLE,
        help="PEM certificates of the authorities to trust for grpcs:// and https://. Default: the system's for "
        "https://, gRPC's own for grpcs://.",
    ),
]
CertFile = Annotated[
    Path | None, typer.Option(envvar=CERT_FILE_VARIABLE, help="Your PEM certificate, for a server that requires one.")
]
KeyFile = Annotated[Path | None, typer.Option(envvar=KEY_FILE_VARIABLE, help="Its private key, unencrypted PEM.")]


def connect(url: str, **options: Any) -> EmbeddingClient:
    """A client with the backend and the API key of the environment. Exits for invalid options."""
    try:
        return EmbeddingClient(
            url,
            backend=cast(Backend, os.environ.get(BACKEND_VARIABLE) or "triton"),  # the client checks it
            api_key=os.environ.get(API_KEY_VARIABLE) or None,
            **options,
        )
    except (ValueError, ModuleNotFoundError) as error:
        exit_with(USAGE, one_line(error))


def require_ready(client: EmbeddingClient) -> None:
    """Exit if no server is ready."""
    if client.is_ready():
        return
    certificates = " or the right --ca-file, --cert-file and --key-file" if "s://" in client.url else ""
    export = ", with a text tower (clip-tools export-onnx)" if client.model == TEXT_MODEL else ""
    exit_with(
        NO_SERVER,
        f"no {client.model} at {client.url}: start the server (make serve){export}, or give --url{certificates}",
    )


def require_server_info(client: EmbeddingClient) -> ServerInfo:
    """What the server reports. Exits if none is ready."""
    require_ready(client)
    return client.served()


class StatusOutput:
    """Writes messages to stderr, and a progress bar if it is a terminal and the run takes over two seconds."""

    def __init__(self, *, shows_bar: bool) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # rich would send the data to stderr
            disable=not (shows_bar and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=None)  # the number of files is not known yet
        self._begun_s = time.monotonic()
        self.has_reconnected = False  # a lost server is back; it may have other weights
        self._handler = _Handler(self)  # shows what the client logs: a server is lost or back

    def __enter__(self) -> Self:
        _log.addHandler(self._handler)
        _log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        _log.removeHandler(self._handler)
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        self._bar.advance(self._task, count)
        if not self._bar.live.is_started and time.monotonic() - self._begun_s > 2:
            self._bar.start()

    def set_progress(self, share: float) -> None:
        """Show which share of the work is done."""
        self._bar.update(self._task, total=1000, completed=1000 * share)
        self.advance(0)

    def print(self, line: str) -> None:
        self._console.print(printable(line), markup=False, highlight=False, emoji=False, soft_wrap=True)


class _Handler(logging.Handler):
    def __init__(self, status: StatusOutput) -> None:
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        message = one_line(record.getMessage())
        self._status.has_reconnected |= record.msg == READY_AGAIN
        self._status.print(message)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def exit_with(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"clip-embed: {printable(message)}\n")
    raise typer.Exit(code)
