"""The command `clip-embed`: images and folders of them in, embeddings on stdout, messages on stderr."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from itertools import chain, tee
from pathlib import Path
from typing import Annotated, cast

from clip_embed import jsonl, parquet
from clip_embed.client import EmbeddingClient
from clip_embed.endpoint import DEFAULT_URL
from clip_embed.errors import ContractError, EmbeddingError, InvalidImageError, InvalidTextError
from clip_embed.file_listing import IMAGE_SUFFIXES, FileListing, UnusableList
from clip_embed.library import ENDINGS
from clip_embed.names import printable
from clip_embed.output import Format, Output, open_output
from clip_embed.provenance import Provenance
from clip_embed.server_info import ServerInfo
from clip_embed.table import Table, TextRow, UnusableOutput, has_parts, is_missing, parts_folder
from clip_embed.wire import DEFAULT_MODEL, TEXT_MODEL

try:
    import typer

    from clip_embed.terminal import (
        BROKEN_PIPE,
        FATAL_ERRORS,
        INTERRUPTED,
        NO_SERVER,
        SOME_FAILED,
        USAGE,
        CaFile,
        CertFile,
        KeyFile,
        StatusOutput,
        Url,
        connect,
        exit_with,
        one_line,
        require_ready,
        require_server_info,
    )
except ModuleNotFoundError:  # only the installed command imports this module, so it may end the process
    sys.stderr.write("clip-embed: the command needs more packages: pip install 'clip-embed[cli]'\n")
    sys.exit(2)

# The commands that read a library, `clip-embed NAME LIBRARY ...`; see `cli_library`.
LIBRARY_COMMANDS = ("search", "duplicates")
_RECOVERY_TIMEOUT_S = 60.0  # how long to wait for an answer of a server that was lost and came back; not measured

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def embed(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Files, folders to search for images, or - for paths on stdin."),
    ] = [],  # noqa: B006  typer makes a new one
    *,
    text: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="Embed a text instead of images; may be repeated. - reads stdin, one text per line. jsonl has "
            '{"text": ..., "embedding": [...]}; in parquet the column path holds the text, in npy FILE.paths.',
        ),
    ] = [],  # noqa: B006
    url: Url = DEFAULT_URL,
    output_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help='jsonl: one line {"path": ..., "size_bytes": ..., "mtime_ns": ..., "embedding": [...]} for each image '
            "that did not fail. parquet: rows with these four columns. npy: one (N, 512) float32 array; row i is image "
            "i, NaN if it failed, and line i of FILE.paths is its path. Default: by the suffix of the output's name.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            "-o",
            help="The output file. It is replaced when all is written; its mode and links to it are kept. A device or "
            "a FIFO is written to directly. Default: stdout.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep finished rows even if the run is killed, and embed only images that are new, failed or changed. "
            "For jsonl and parquet.",
        ),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="With --resume: drop the rows of files that no longer exist. Relative paths start from the current "
            "folder.",
        ),
    ] = False,
    exclude: Annotated[
        list[str],
        typer.Option(
            metavar="GLOB",
            help="Skip files and folders whose name, or path inside the given folder, matches; may be repeated.",
        ),
    ] = [],  # noqa: B006  typer makes a new one
    include: Annotated[
        list[str],
        typer.Option(
            metavar="GLOB",
            help="Also take matching files and folders that would be skipped: by --exclude, as litter (thumbnails, "
            "trash, ._ files) or by their suffix; may be repeated.",
        ),
    ] = [],  # noqa: B006
    every_file: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Send every file in the folders and let the server decide by its content whether it is an image. By "
            "default, only files with the suffix of a format that the server accepts are sent.",
        ),
    ] = False,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Paths on stdin end with NUL, as `find -print0` writes them.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per request; the server accepts at most 64.")] = 8,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 8,
    timeout_s: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Deadline of each request with all attempts, in seconds: how long to wait for a lost server.",
        ),
    ] = 300.0,
    attempt_timeout_s: Annotated[float, typer.Option(min=0.001, help="Deadline of each attempt, in seconds.")] = 30.0,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
) -> None:
    """Embed images or texts. Writes data to stdout in order, and a line to stderr for each image that failed.

    The last line on stderr says which files in the folders were skipped. `clip-embed search` and `clip-embed
    duplicates` read the .parquet or .npy file that this writes; for a folder named search, give ./search.

    A server's API key is read from CLIP_API_KEY, because an option would be visible in the list of processes.
    INFERENCE_BACKEND=pytorch selects the PyTorch service.

    Exit codes: 0 all good, 1 some images failed, 2 usage, 3 the server cannot be reached or used.
    """
    destination = _checked_destination(output, output_format, resume=resume, prune=prune)
    _check_inputs(images, text, null=null, prune=prune)
    listing = FileListing(
        tuple(exclude), tuple(include), b"\0" if null else b"\n", None if every_file else IMAGE_SUFFIXES
    )
    open_client = partial(
        connect,
        url,
        timeout_s=timeout_s,
        attempt_timeout_s=attempt_timeout_s,
        batch_size=batch_size,
        max_in_flight=max_in_flight,
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
    )
    clients = [open_client(model=DEFAULT_MODEL), *([open_client(model=TEXT_MODEL)] if text else [])]
    # Another thread does the work, so that Ctrl-C interrupts this one, which only waits. Inside grpc's code it could
    # get lost, or leave a client that does not close.
    pool = ThreadPoolExecutor(1)
    if text:
        work = pool.submit(_run_texts, clients[0], clients[1], text, destination)
    else:
        work = pool.submit(_run, clients[0], listing, images, destination)
    try:
        while not work.done():
            wait([work], timeout=0.2)  # Python can miss a signal that arrives just as an unlimited wait begins
        some_failed = work.result()
    except KeyboardInterrupt:
        for client in clients:
            client.close()  # ends the work, unless it waits for stdin: hence the timeout
        wait([work], timeout=2.0)
        sys.stderr.write(f"clip-embed: {printable(destination.interrupted_message)}\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    except FATAL_ERRORS as error:
        exit_with(NO_SERVER, f"{one_line(error)}{destination.resume_hint}")
    except InvalidTextError as error:
        exit_with(SOME_FAILED, f"{one_line(error)}; nothing was written")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        exit_with(USAGE, f"cannot write {output or 'stdout'}: {error.strerror or error}{destination.resume_hint}")
    except (UnusableOutput, UnusableList) as error:
        exit_with(USAGE, one_line(error))
    if some_failed:
        raise typer.Exit(SOME_FAILED)


def main() -> None:
    """The entry point."""
    for argument in sys.argv[1:]:
        if argument.startswith("-") and argument != printable(argument):  # typer would print it unescaped
            sys.stderr.write(f"clip-embed: {printable(argument)}: no such option; for such a file give ./NAME\n")
            sys.exit(USAGE)
    if is_library_command(sys.argv[1:]):
        from clip_embed import cli_library

        cli_library.app()
    app()


def is_library_command(arguments: list[str]) -> bool:
    """Whether the arguments are `search LIBRARY ...` or `duplicates LIBRARY ...`, not images to embed.

    If a file or folder has that name, a library must come next: `clip-embed search` alone embeds the folder.
    """
    if not arguments or arguments[0] not in LIBRARY_COMMANDS:
        return False
    if not os.path.lexists(arguments[0]):
        return True
    return len(arguments) > 1 and (arguments[1] == "--help" or arguments[1].lower().endswith(ENDINGS))


@dataclass
class _Destination:
    """The output, and how many embeddings this run has written to it."""

    path: Path | None
    format: Format
    resume: bool
    prune: bool
    is_special: bool  # a device or a FIFO, written to directly
    embedded: int = 0

    def open(self, provenance: Provenance | None) -> AbstractContextManager[Output]:
        if not self.resume or self.path is None:
            return open_output(self.path, self.format, provenance)
        from clip_embed.resume import open_resumed  # needs a system with flock

        table: Table = parquet if self.format is Format.parquet else jsonl
        return open_resumed(self.path, table, prune=self.prune, provenance=provenance)

    @property
    def resume_hint(self) -> str:
        """What to tell about finished rows after a run that ended early; empty if there are none."""
        if self.resume and self.path is not None and has_parts(self.path):
            return f"; finished rows are kept in {parts_folder(self.path)}: run it again with --resume"
        return ""

    @property
    def interrupted_message(self) -> str:
        """The message after Ctrl-C."""
        done = f"interrupted after {self.embedded:,} embeddings"
        if self.resume or self.path is None or self.is_special:
            return f"{done}{self.resume_hint}"
        return f"{done}; nothing was written: --resume (jsonl, parquet) keeps finished rows"


def _check_inputs(images: list[str], texts: list[str], *, null: bool, prune: bool) -> None:
    """Exit for invalid inputs, before any request."""
    if bool(images) == bool(texts):
        exit_with(USAGE, "expected images, or texts with --text, and not both")
    if texts and prune:
        exit_with(USAGE, "--prune drops the rows of missing files: it cannot be used with --text")
    if null and "-" not in images:
        exit_with(USAGE, "-0 is for paths on stdin: give - as an IMAGE")
    if images and all(argument != "-" and is_missing(argument) for argument in images):
        exit_with(USAGE, f"no such file or folder: {', '.join(images)}")


def _checked_destination(path: Path | None, file_format: Format | None, *, resume: bool, prune: bool) -> _Destination:
    """The output. Exits if it cannot be written."""
    file_format = _format(path, file_format)
    is_special = False
    if path is not None:
        from clip_embed import atomic_file

        path = atomic_file.resolve_link(path)
        is_special = atomic_file.is_special(path)
        if resume and is_special:
            exit_with(USAGE, f"--resume needs a regular file: {path} is not one")
    if path is None and resume:
        exit_with(USAGE, "--resume needs --output FILE")
    if prune and not resume:
        exit_with(USAGE, "--prune needs --resume")
    if path is None and file_format is not Format.jsonl and sys.stdout.isatty():
        exit_with(USAGE, f"{file_format} is binary and stdout is a terminal: give --output FILE")
    if resume and file_format is Format.npy:
        exit_with(USAGE, "npy does not name its images: --resume needs jsonl or parquet")
    if path is not None and not resume and has_parts(path):
        exit_with(
            USAGE, f"{parts_folder(path)} has finished rows of an earlier run: add --resume to go on, or remove it"
        )
    if file_format is Format.parquet:
        try:
            parquet.require_pyarrow()
        except ModuleNotFoundError as error:
            exit_with(USAGE, str(error))
    return _Destination(path, file_format, resume, prune, is_special)


def _format(path: Path | None, chosen: Format | None) -> Format:
    """The chosen format, or that of the file's name. Exits if they contradict each other."""
    ending = path.name.rpartition(".")[2].lower() if path and "." in path.name else ""
    named = Format(ending) if ending in list(Format) else None
    if path and chosen and named and named is not chosen:
        exit_with(USAGE, f"{path} ends with .{ending}, and --format is {chosen}: change one of them")
    if path and ending and not (chosen or named):
        exit_with(USAGE, f"{path}: expected a name that ends with .jsonl, .npy or .parquet; or say --format")
    return chosen or named or Format.jsonl


def _run(client: EmbeddingClient, listing: FileListing, arguments: list[str], destination: _Destination) -> bool:
    """Embed images and write the rows. Returns whether some images failed."""
    some_failed = False
    with client, StatusOutput(shows_bar=not (destination.path is None and sys.stdout.isatty())) as status:
        info = require_server_info(client)
        if listing.suffixes and info.suffixes:
            listing.suffixes = info.suffixes
        paths = listing.paths(arguments, cast(BufferedIOBase, sys.stdin.buffer))
        if (first := next(paths, None)) is None:
            exit_with(USAGE, "; ".join(filter(None, (f"no images found in {' '.join(arguments)}", listing.report()))))
        with destination.open(info.provenance) as output:
            if output.warning:
                status.print(output.warning)
            # tee holds no more images than are read ahead.
            to_embed, to_name = tee(output.unfinished(chain([first], paths)))
            results = client.embed_many(image.path for image in to_embed)
            for image, result in zip(to_name, results, strict=True):
                if isinstance(result, FATAL_ERRORS):
                    raise result
                if status.has_reconnected:
                    _check_weights(client, info)
                    status.has_reconnected = False
                if isinstance(result, EmbeddingError):
                    some_failed = True
                    status.print(f"{image.path}: {_describe(result)}")
                    output.add(image, None)
                else:
                    output.add(image, result)
                    destination.embedded += 1
                status.advance()
            if output.already_embedded:
                status.print(f"{output.already_embedded} of the images were there already")
            if output.pruned:
                status.print(f"{output.pruned} rows of missing images were dropped")
        if skipped := listing.report():
            status.print(skipped)
    return some_failed


def _check_weights(client: EmbeddingClient, info: ServerInfo) -> None:
    """Raises ContractError if the server has other weights than before it was lost."""
    deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
    while True:
        try:
            now = client.served()
            break
        except EmbeddingError as error:
            if not error.retryable or time.monotonic() > deadline:
                raise
        time.sleep(0.5)
    if now.provenance != info.provenance:
        raise ContractError(
            f"{client.url} came back with other weights: {now.provenance or 'not known'}; before it was "
            f"{info.provenance or 'not known'}. Serve the earlier ones, or write to a new file"
        )


def _run_texts(images: EmbeddingClient, client: EmbeddingClient, given: list[str], destination: _Destination) -> bool:
    """Embed and write all texts, or none. Returns False: no text failed.

    The image ensemble reports the weights; the server ensures that both towers have the same.
    """
    with images, client, StatusOutput(shows_bar=False) as status:
        require_ready(client)
        info = images.served()
        texts: list[str] = []
        for text in given:
            texts += _lines_of_stdin() if text == "-" else [text]
        with destination.open(info.provenance and info.provenance.of_texts()) as output:
            if output.warning:
                status.print(output.warning)
            rows = list(output.unfinished(texts, TextRow.of))
            embeddings = client.embed_text(row.path for row in rows)
            if status.has_reconnected:
                _check_weights(images, info)
            for row, embedding in zip(rows, embeddings, strict=True):
                output.add(row, embedding)
                destination.embedded += 1
            if output.already_embedded:
                status.print(f"{output.already_embedded} of the texts were there already")
    return False


def _lines_of_stdin() -> list[str]:
    """The lines of stdin. The client refuses a line that is not UTF-8."""
    return sys.stdin.buffer.read().decode(errors="surrogateescape").splitlines()


def _describe(error: EmbeddingError) -> str:
    """`code: reason`."""
    if isinstance(error, InvalidImageError):
        return ": ".join(filter(None, (error.failures[0].code, one_line(error.failures[0].reason))))
    return f"{type(error).__name__}: {one_line(error)}"
