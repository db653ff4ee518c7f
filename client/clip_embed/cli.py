"""The command `clip-embed`: images and folders of them in, embeddings on stdout, talk on stderr."""

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
from clip_embed.errors import ContractError, EmbeddingError, InvalidImageError, InvalidTextError
from clip_embed.finding import IMAGE_SUFFIXES, Search, UnusableList
from clip_embed.library import ENDINGS
from clip_embed.names import printable
from clip_embed.output import Format, Output, open_output
from clip_embed.provenance import Provenance
from clip_embed.served import Served
from clip_embed.table import Table, TextRow, UnusableOutput, has_parts, is_gone, parts_of
from clip_embed.target import DEFAULT_URL
from clip_embed.wire import DEFAULT_MODEL, TEXT_MODEL

try:
    import typer

    from clip_embed.terminal import (
        BROKEN_PIPE,
        HOPELESS,
        INTERRUPTED,
        NO_SERVER,
        SOME_FAILED,
        USAGE,
        CaFile,
        CertFile,
        KeyFile,
        Talk,
        Url,
        connect,
        exit_with,
        one_line,
        require_ready,
        served_by,
    )
except ModuleNotFoundError:  # only the installed command imports this module, so it may end the process
    sys.stderr.write("clip-embed: the command needs more packages: pip install 'clip-embed[cli]'\n")
    sys.exit(2)

# What `clip-embed NAME LIBRARY ...` does with what was embedded; see `cli_library`.
ON_LIBRARIES = ("search", "duplicates")
_GONE_AGAIN_S = 60.0  # how long to ask a server that was lost, came back, and does not answer; not measured

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
            help='Embed a text instead of images; may be repeated. - reads stdin, a text a line. jsonl has {"text": '
            '..., "embedding": [...]}; in parquet the column path holds the text, in npy FILE.paths.',
        ),
    ] = [],  # noqa: B006
    url: Url = DEFAULT_URL,
    output_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help='jsonl: a line {"path": ..., "size_bytes": ..., "mtime_ns": ..., "embedding": [...]} for each image, '
            "none for one that failed. parquet: rows of the same four. npy: one (N, 512) float32 array; row i is image "
            "i, NaN if it failed, and FILE.paths has its path as line i. Default: what the output's name ends with.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            "-o",
            help="A file, written whole or not at all, through links and with the mode of what was there; a device or "
            "a FIFO is written to. Default: stdout.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is finished, also when the run is killed, and embed only the images that the output does "
            "not have, that failed or that have changed. For jsonl and parquet.",
        ),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="With --resume: drop the rows of files that are gone. A relative path is looked for from the folder "
            "that the command runs in.",
        ),
    ] = False,
    exclude: Annotated[
        list[str],
        typer.Option(
            metavar="GLOB",
            help="Leave out of the folders what has such a name, or such a path in the folder given; may be repeated.",
        ),
    ] = [],  # noqa: B006  typer makes a new one
    include: Annotated[
        list[str],
        typer.Option(
            metavar="GLOB",
            help="Also take files in folders that would be skipped: by --exclude, as litter (thumbnails, trash, ._ "
            "files) or by their ending; may be repeated.",
        ),
    ] = [],  # noqa: B006
    every_file: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Take every file of the folders, whatever its ending, and let the server tell by its content whether "
            "it is an image. Without it those are taken whose ending is that of a format that the server takes.",
        ),
    ] = False,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Each path on stdin ends with a NUL, as `find -print0` writes them.")
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
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
) -> None:
    """Embed images, or texts: data on stdout in their order, one line on stderr for each image that failed.

    The last line on stderr says which files of the folders were not taken. `clip-embed search` and `clip-embed
    duplicates` work on the .parquet or .npy file that comes of it; a folder of such a name is ./search.

    The key of a server that asks for one is read from CLIP_API_KEY: an option could be seen in the list of processes.
    INFERENCE_BACKEND=pytorch says that the server is the PyTorch service.

    Exit codes: 0 all good, 1 some images failed, 2 usage, 3 the server cannot be reached or used.
    """
    target = _target(output, output_format, resume=resume, prune=prune)
    _check_inputs(images, text, null=null, prune=prune)
    search = Search(tuple(exclude), tuple(include), b"\0" if null else b"\n", None if every_file else IMAGE_SUFFIXES)
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
    # The work has its own thread, so that Ctrl-C meets this one, which only waits: in the midst of grpc's code it could
    # be lost, or leave a client that does not close.
    pool = ThreadPoolExecutor(1)
    if text:
        work = pool.submit(_run_texts, clients[0], clients[1], text, target)
    else:
        work = pool.submit(_run, clients[0], search, images, target)
    try:
        some_failed = work.result()
    except KeyboardInterrupt:
        for client in clients:
            client.close()  # which ends the work, unless it waits for stdin: hence the timeout
        wait([work], timeout=2.0)
        sys.stderr.write(f"clip-embed: {printable(target.interrupted)}\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    except HOPELESS as error:
        exit_with(NO_SERVER, f"{one_line(error)}{target.kept}")
    except InvalidTextError as error:
        exit_with(SOME_FAILED, f"{one_line(error)}; nothing was written")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit meets the pipe again
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        exit_with(USAGE, f"cannot write {output or 'stdout'}: {error.strerror or error}{target.kept}")
    except (UnusableOutput, UnusableList) as error:
        exit_with(USAGE, one_line(error))
    if some_failed:
        raise typer.Exit(SOME_FAILED)


def main() -> None:
    """The entry point."""
    for argument in sys.argv[1:]:
        if argument.startswith("-") and argument != printable(argument):  # typer would print it as it is
            sys.stderr.write(f"clip-embed: {printable(argument)}: no such option; is it a file, give ./NAME\n")
            sys.exit(USAGE)
    if is_on_library(sys.argv[1:]):
        from clip_embed import cli_library

        cli_library.app()
    app()


def is_on_library(arguments: list[str]) -> bool:
    """Whether they are `search LIBRARY ...` or `duplicates LIBRARY ...`, and no images to embed.

    Where a file or folder has that name, only if a library comes next: `clip-embed search` goes on to embed the folder.
    """
    if not arguments or arguments[0] not in ON_LIBRARIES:
        return False
    if not os.path.lexists(arguments[0]):
        return True
    return len(arguments) > 1 and (arguments[1] == "--help" or arguments[1].lower().endswith(ENDINGS))


@dataclass
class _Target:
    """Where the embeddings go, and how many went there in this run."""

    path: Path | None
    format: Format
    resume: bool
    prune: bool
    is_special: bool  # a device or a FIFO, which is written to at once
    embedded: int = 0

    def open(self, provenance: Provenance | None) -> AbstractContextManager[Output]:
        if not self.resume or self.path is None:
            return open_output(self.path, self.format, provenance)
        from clip_embed.resume import open_resumed  # which needs a system with flock

        table: Table = parquet if self.format is Format.parquet else jsonl
        return open_resumed(self.path, table, prune=self.prune, provenance=provenance)

    @property
    def kept(self) -> str:
        """What to say after a run that ended too early."""
        if self.resume and self.path is not None and has_parts(self.path):
            return f"; what was finished is kept in {parts_of(self.path)}: run it again with --resume"
        return ""

    @property
    def interrupted(self) -> str:
        """What to say after Ctrl-C."""
        done = f"interrupted after {self.embedded:,} embeddings"
        if self.resume or self.path is None or self.is_special:
            return f"{done}{self.kept}"
        return f"{done}; nothing was written: --resume (jsonl, parquet) keeps what is finished"


def _check_inputs(images: list[str], texts: list[str], *, null: bool, prune: bool) -> None:
    """Exits for inputs that make no sense, before a server is asked."""
    if bool(images) == bool(texts):
        exit_with(USAGE, "expected images, or texts with --text, and not both")
    if texts and prune:
        exit_with(USAGE, "--prune drops the rows of files that are gone: it does not go with --text")
    if null and "-" not in images:
        exit_with(USAGE, "-0 is for paths on stdin: give - as an IMAGE")
    if images and all(argument != "-" and is_gone(argument) for argument in images):
        exit_with(USAGE, f"no such file or folder: {', '.join(images)}")


def _target(path: Path | None, file_format: Format | None, *, resume: bool, prune: bool) -> _Target:
    """Refuses what cannot be written."""
    file_format = _format(path, file_format)
    is_special = False
    if path is not None:
        from clip_embed import destination

        path = destination.through_links(path)
        is_special = destination.is_special(path)
        if resume and is_special:
            exit_with(USAGE, f"--resume needs a file that can be read and replaced, {path} is none")
    if path is None and resume:
        exit_with(USAGE, "--resume needs --output FILE")
    if prune and not resume:
        exit_with(USAGE, "--prune needs --resume")
    if path is None and file_format is not Format.jsonl and sys.stdout.isatty():
        exit_with(USAGE, f"{file_format} is binary and stdout is a terminal: give --output FILE")
    if resume and file_format is Format.npy:
        exit_with(USAGE, "npy does not name its images: --resume needs jsonl or parquet")
    if path is not None and not resume and has_parts(path):
        exit_with(USAGE, f"{parts_of(path)} holds what an earlier run finished: add --resume to go on, or remove it")
    if file_format is Format.parquet:
        try:
            parquet.require_pyarrow()
        except ModuleNotFoundError as error:
            exit_with(USAGE, str(error))
    return _Target(path, file_format, resume, prune, is_special)


def _format(path: Path | None, chosen: Format | None) -> Format:
    """What the path's name says, or what was chosen; a name with another ending is refused, so that none lies."""
    ending = path.name.rpartition(".")[2].lower() if path and "." in path.name else ""
    named = Format(ending) if ending in list(Format) else None
    if path and chosen and named and named is not chosen:
        exit_with(USAGE, f"{path} ends with .{ending}, and --format is {chosen}: change one of them")
    if path and ending and not (chosen or named):
        exit_with(USAGE, f"{path}: expected a name that ends with .jsonl, .npy or .parquet; or say --format")
    return chosen or named or Format.jsonl


def _run(client: EmbeddingClient, search: Search, arguments: list[str], target: _Target) -> bool:
    """Embed and write; returns whether some images failed."""
    some_failed = False
    with client, Talk(shows_bar=not (target.path is None and sys.stdout.isatty())) as talk:
        served = served_by(client)
        if search.suffixes and served.suffixes:
            search.suffixes = served.suffixes
        paths = search.paths(arguments, cast(BufferedIOBase, sys.stdin.buffer))
        if (first := next(paths, None)) is None:
            exit_with(USAGE, "; ".join(filter(None, (f"no images found in {' '.join(arguments)}", search.report()))))
        with target.open(served.provenance) as output:
            if output.warning:
                talk.say(output.warning)
            # tee holds no more images than are read ahead.
            to_embed, to_name = tee(output.unfinished(chain([first], paths)))
            results = client.embed_many(image.path for image in to_embed)
            for image, result in zip(to_name, results, strict=True):
                if isinstance(result, HOPELESS):
                    raise result
                if talk.has_come_back:
                    _check_weights(client, served)
                    talk.has_come_back = False
                if isinstance(result, EmbeddingError):
                    some_failed = True
                    talk.say(f"{image.path}: {_describe(result)}")
                    output.add(image, None)
                else:
                    output.add(image, result)
                    target.embedded += 1
                talk.advance()
            if output.already_there:
                talk.say(f"{output.already_there} of the images were there already")
            if output.pruned:
                talk.say(f"{output.pruned} rows of images that are gone were dropped")
        if not_taken := search.report():
            talk.say(not_taken)
    return some_failed


def _check_weights(client: EmbeddingClient, served: Served) -> None:
    """Raises ContractError when the server has other weights than before it was lost."""
    deadline = time.monotonic() + _GONE_AGAIN_S
    while True:
        try:
            now = client.served()
            break
        except EmbeddingError as error:
            if not error.retryable or time.monotonic() > deadline:
                raise
        time.sleep(0.5)
    if now.provenance != served.provenance:
        raise ContractError(
            f"{client.url} came back with other weights: {now.provenance or 'it does not say which'}; before it was "
            f"{served.provenance or 'not known'}. Serve the earlier ones, or begin a new file"
        )


def _run_texts(images: EmbeddingClient, client: EmbeddingClient, given: list[str], target: _Target) -> bool:
    """Embeds and writes all texts, or none; whether some failed, which is no.

    The image ensemble reports the weights; the server makes sure that both towers have the same.
    """
    with images, client, Talk(shows_bar=False) as talk:
        require_ready(client)
        served = images.served()
        texts: list[str] = []
        for text in given:
            texts += _lines_of_stdin() if text == "-" else [text]
        with target.open(served.provenance and served.provenance.of_texts()) as output:
            if output.warning:
                talk.say(output.warning)
            rows = list(output.unfinished(texts, TextRow.of))
            embeddings = client.embed_text(row.path for row in rows)
            if talk.has_come_back:
                _check_weights(images, served)
            for row, embedding in zip(rows, embeddings, strict=True):
                output.add(row, embedding)
                target.embedded += 1
            if output.already_there:
                talk.say(f"{output.already_there} of the texts were there already")
    return False


def _lines_of_stdin() -> list[str]:
    """What is not UTF-8 in them the client refuses."""
    return sys.stdin.buffer.read().decode(errors="surrogateescape").splitlines()


def _describe(error: EmbeddingError) -> str:
    """`code: reason`."""
    if isinstance(error, InvalidImageError):
        return ": ".join(filter(None, (error.failures[0].code, one_line(error.failures[0].reason))))
    return f"{type(error).__name__}: {one_line(error)}"
