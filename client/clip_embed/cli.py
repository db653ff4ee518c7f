"""The command `clip-embed`: images and folders of them in, embeddings on stdout, talk on stderr."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, tee
from pathlib import Path
from typing import Annotated, NoReturn, Self

from clip_embed import jsonl, parquet
from clip_embed.client import EmbeddingClient
from clip_embed.credentials import (
    API_KEY_VARIABLE,
    CA_FILE_VARIABLE,
    CERT_FILE_VARIABLE,
    KEY_FILE_VARIABLE,
)
from clip_embed.errors import (
    ContractError,
    CredentialsError,
    EmbeddingError,
    InvalidImageError,
    ModelNotReadyError,
    ServerUnavailableError,
)
from clip_embed.output import Format, Output, open_output
from clip_embed.table import UnusableOutput, has_parts, parts_of
from clip_embed.target import DEFAULT_URL, URL_VARIABLE

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
except ModuleNotFoundError:  # only the installed command imports this module, so it may end the process
    sys.stderr.write("clip-embed: the command needs more packages: pip install 'clip-embed[cli]'\n")
    sys.exit(2)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
SOME_FAILED, USAGE, NO_SERVER, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141
# The next image would fare no better.
HOPELESS = (ServerUnavailableError, ModelNotReadyError, CredentialsError, ContractError)

_log = logging.getLogger("clip_embed")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def embed(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Files, folders to search for images, or - for paths on stdin."),
    ],
    *,
    url: Annotated[
        str,
        typer.Option(
            envvar=URL_VARIABLE, help="The server: grpc(s):// or http(s)://; several with commas between them."
        ),
    ] = DEFAULT_URL,
    output_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help='jsonl: a line {"path": ..., "size_bytes": ..., "mtime_ns": ..., "embedding": [...]} for each image, '
            "none for one that failed. parquet: rows of the same four. npy: one (N, 512) float32 array; row i is image "
            "i, NaN if it failed. Default: what the output's name ends with, else jsonl.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", "-o", help="A file, written whole or not at all; default: stdout."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is finished, also when the run is killed, and embed only the images that the output does "
            "not have, that failed or that have changed. For jsonl and parquet.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a request, at most; the server takes 64.")] = 8,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Requests on their way at once.")] = 8,
    timeout_s: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Deadline of each request, in seconds, with all attempts: how long to wait for a "
            "server that has gone.",
        ),
    ] = 300.0,
    attempt_timeout_s: Annotated[float, typer.Option(min=0.001, help="Deadline of each attempt, in seconds.")] = 30.0,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            envvar=CA_FILE_VARIABLE,
            help="Certificates, PEM, by which a grpcs:// or https:// server is known; default: the system's for "
            "https://, those that gRPC brings for grpcs://.",
        ),
    ] = None,
    cert_file: Annotated[
        Path | None,
        typer.Option(envvar=CERT_FILE_VARIABLE, help="Your certificate, PEM, for a server that asks for one."),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(envvar=KEY_FILE_VARIABLE, help="Its private key, PEM, not encrypted.")
    ] = None,
) -> None:
    """Embed images: data on stdout in the order of the images, one line on stderr for each that failed.

    The key of a server that asks for one is read from CLIP_API_KEY: an option could be seen in the list of processes.

    Exit codes: 0 all good, 1 some images failed, 2 usage, 3 the server cannot be reached or used.
    """
    target = _target(output, output_format, resume=resume)
    try:
        client = EmbeddingClient(
            url,
            timeout_s=timeout_s,
            attempt_timeout_s=attempt_timeout_s,
            batch_size=batch_size,
            max_in_flight=max_in_flight,
            api_key=os.environ.get(API_KEY_VARIABLE) or None,
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
        )
    except (ValueError, ModuleNotFoundError) as error:
        _exit(USAGE, str(error))
    # The work has its own thread, so that Ctrl-C meets this one, which only waits: in the midst of grpc's code it could
    # be lost, or leave a client that does not close.
    work = ThreadPoolExecutor(1).submit(_run, client, images, target)
    try:
        some_failed = work.result()
    except KeyboardInterrupt:
        client.close()  # which ends the work, but where it waits for stdin: so its end is not waited for long
        wait([work], timeout=2.0)
        os._exit(INTERRUPTED)
    except HOPELESS as error:
        _exit(NO_SERVER, f"{error}{target.kept}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit meets the pipe again
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        _exit(USAGE, f"cannot write {output or 'stdout'}: {error.strerror or error}{target.kept}")
    except UnusableOutput as error:
        _exit(USAGE, str(error))
    if some_failed:
        raise typer.Exit(SOME_FAILED)


def main() -> None:
    """The entry point."""
    app()


@dataclass(frozen=True)
class _Target:
    """Where the embeddings go."""

    path: Path | None
    format: Format
    resume: bool

    def open(self) -> AbstractContextManager[Output]:
        if not self.resume or self.path is None:
            return open_output(self.path, self.format)
        from clip_embed.resume import open_resumed  # which needs a system with flock

        return open_resumed(self.path, parquet if self.format is Format.parquet else jsonl)

    @property
    def kept(self) -> str:
        """What to say after a run that ended too early."""
        if self.resume and self.path is not None and has_parts(self.path):
            return f"; what was finished is kept in {parts_of(self.path)}: run it again with --resume"
        return ""


def _target(path: Path | None, file_format: Format | None, *, resume: bool) -> _Target:
    """Refuses what cannot be written."""
    if file_format is None:
        suffix = path.suffix.removeprefix(".") if path else ""
        file_format = Format(suffix) if suffix in list(Format) else Format.jsonl
    if path is None and resume:
        _exit(USAGE, "--resume needs --output FILE")
    if path is None and file_format is not Format.jsonl and sys.stdout.isatty():
        _exit(USAGE, f"{file_format} is binary and stdout is a terminal: give --output FILE")
    if resume and file_format is Format.npy:
        _exit(USAGE, "npy does not name its images: --resume needs jsonl or parquet")
    if path is not None and not resume and has_parts(path):
        _exit(USAGE, f"{parts_of(path)} holds what an earlier run finished: add --resume to go on, or remove it")
    if file_format is Format.parquet:
        try:
            parquet.require_pyarrow()
        except ModuleNotFoundError as error:
            _exit(USAGE, str(error))
    return _Target(path, file_format, resume)


def _run(client: EmbeddingClient, arguments: list[str], target: _Target) -> bool:
    """Embeds and writes; whether some images failed."""
    paths = find_images(arguments, sys.stdin.buffer)
    if (first := next(paths, None)) is None:
        _exit(USAGE, f"no images found in {' '.join(arguments)}")
    some_failed = False
    with client, _Talk(shows_bar=not (target.path is None and sys.stdout.isatty())) as talk:
        if not client.is_ready():
            certificates = " or the right --ca-file, --cert-file and --key-file" if "s://" in client.url else ""
            _exit(
                NO_SERVER,
                f"no {client.model} at {client.url}: start the server (make serve), or give --url{certificates}",
            )
        with target.open() as output:
            # tee holds no more images than are read ahead.
            to_embed, to_name = tee(output.unfinished(chain([first], paths)))
            results = client.embed_many(image.path for image in to_embed)
            for image, result in zip(to_name, results, strict=True):
                if isinstance(result, HOPELESS):
                    raise result
                if isinstance(result, EmbeddingError):
                    some_failed = True
                    talk.say(f"{image.path}: {_describe(result)}")
                output.add(image, None if isinstance(result, EmbeddingError) else result)
                talk.advance()
            if output.already_there:
                talk.say(f"{output.already_there} of the images were there already")
    return some_failed


def find_images(arguments: Iterable[str], stdin: Iterable[bytes]) -> Iterator[str]:
    """The paths that the arguments mean, lazily; of a folder those with a known suffix, sorted within each folder."""
    for argument in arguments:
        if argument == "-":
            yield from filter(None, (os.fsdecode(line).rstrip("\r\n") for line in stdin))
        elif Path(argument).is_dir():
            yield from _walk(argument)
        else:
            yield argument


def _walk(root: str) -> Iterator[str]:
    unlisted: list[str] = []  # folders that cannot be read: given as if they were images, so that they are reported
    for folder, subfolders, names in os.walk(root, onerror=lambda error: unlisted.append(error.filename)):
        subfolders.sort()
        files = (Path(folder, name) for name in sorted(names))
        yield from (str(file) for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
    yield from unlisted


class _Talk:
    """What is said on stderr: lines, and a progress bar if it is a terminal and the run lasts over two seconds."""

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
        self._task = self._bar.add_task("", total=None)  # a folder's size is not known before its end
        self._begun_s = time.monotonic()
        self._handler = _Handler(self)  # of what the client logs: a server that goes, and that comes back

    def __enter__(self) -> Self:
        _log.addHandler(self._handler)
        _log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        _log.removeHandler(self._handler)
        self._bar.stop()

    def advance(self) -> None:
        self._bar.advance(self._task)
        if not self._bar.live.is_started and time.monotonic() - self._begun_s > 2:
            self._bar.start()

    def say(self, line: str) -> None:
        self._console.print(" ".join(line.split()), markup=False, highlight=False, emoji=False, soft_wrap=True)


class _Handler(logging.Handler):
    def __init__(self, talk: _Talk) -> None:
        super().__init__()
        self._talk = talk

    def emit(self, record: logging.LogRecord) -> None:
        self._talk.say(record.getMessage())


def _describe(error: EmbeddingError) -> str:
    """`code: reason`."""
    if isinstance(error, InvalidImageError):
        return ": ".join(filter(None, (error.failures[0].code, error.failures[0].reason)))
    return f"{type(error).__name__}: {error}"


def _exit(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"clip-embed: {' '.join(message.split())}\n")
    raise typer.Exit(code)
