"""The commands `clip-embed search` and `clip-embed duplicates`, for files that `clip-embed` wrote."""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from clip_embed import duplicates as grouping
from clip_embed import gallery
from clip_embed.duplicates import Keep
from clip_embed.endpoint import DEFAULT_URL
from clip_embed.errors import EmbeddingError
from clip_embed.file_listing import IMAGE_SUFFIXES
from clip_embed.index import EXACT_ROWS, nearest_by_index, open_index, require_usearch
from clip_embed.library import Library, read_library
from clip_embed.names import printable
from clip_embed.nearest import MOST_PAIRS, nearest, pairs_above
from clip_embed.previews import Preview, read_previews, require_pillow
from clip_embed.provenance import Provenance
from clip_embed.table import UnusableOutput
from clip_embed.terminal import (
    FATAL_ERRORS,
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
from clip_embed.wire import TEXT_MODEL

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

LibraryFile = Annotated[
    Path, typer.Argument(metavar="LIBRARY", help="The .parquet or .npy file that clip-embed wrote.")
]


class Listing(StrEnum):
    """How `search` prints its results."""

    table = "table"
    jsonl = "jsonl"


@app.command()
def search(
    library_file: LibraryFile,
    query: Annotated[
        str,
        typer.Argument(metavar="QUERY", help="The path of an image, or a text. An existing file is an image."),
    ],
    *,
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="How many images to show, nearest first.")] = 10,
    listing: Annotated[
        Listing,
        typer.Option("--format", help='table, or jsonl: a line {"path": ..., "cosine": ...} for each, best first.'),
    ] = Listing.table,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a self-contained page with thumbnails.")
    ] = None,
    use_index: Annotated[
        bool,
        typer.Option(
            "--index",
            help="Search in the index LIBRARY.usearch. If it is missing or outdated, it is built and its recall is "
            "printed. Libraries of over a million images always use it; others compare all vectors.",
        ),
    ] = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
) -> None:
    """Find the images of a library that are nearest to a text or another image, with their cosines.

    The server embeds the query. It must serve the same weights as those of the library.

    Exit codes: 0 found, 1 the query cannot be embedded, 2 usage, 3 the server cannot be reached or used.
    """
    with _exit_on_errors():
        library = read_library(library_file)
        if html:
            require_pillow()
        by_index = use_index or len(library.images) > EXACT_ROWS
        if by_index:
            require_usearch()
        is_image = _is_image(query)
        credentials = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
        with StatusOutput(shows_bar=False) as status:
            with connect(url, **credentials) as client:
                if warning := _check_weights(library, require_server_info(client).provenance):
                    status.print(warning)
                if is_image:
                    vector = client.embed([query])[0]
            if not is_image:
                with connect(url, model=TEXT_MODEL, **credentials) as client:
                    require_ready(client)
                    vector = client.embed_text([query])[0]
        if vector.shape[0] != library.embeddings.shape[1]:
            exit_with(
                USAGE,
                f"{library_file}: expected vectors of {vector.shape[0]} numbers, as the server's, got "
                f"{library.embeddings.shape[1]}",
            )
        if by_index:
            rows, cosines = nearest_by_index(open_index(library, status.print), library.embeddings, vector, count)
        else:
            rows, cosines = nearest(library.embeddings, vector, count)
        kind = "image" if is_image else "text"
        status.print(f"{len(library.images):,} vectors of {library_file}, nearest to the {kind} {query}")
        found = [(library.images[row].path, float(one)) for row, one in zip(rows, cosines, strict=True)]
        _print_results(found, listing)
        if html:
            paths = [path for path, _ in found]
            *previews, shown = read_previews([*paths, query], thumbnail_px=gallery.thumbnail_px(len(found)))
            results = [(path, cosine, preview) for (path, cosine), preview in zip(found, previews, strict=True)]
            about = _with_provenance(
                f"The nearest of {len(library.images):,} images of {library_file}", library.provenance
            )
            with _text_file(html) as file:
                gallery.write_results(results, file, query=query, shown=shown if is_image else None, about=about)
            _warn_missing(previews)


@app.command()
def duplicates(
    library_file: LibraryFile,
    *,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.5,
            max=1.0,
            help="The lowest cosine of a pair. docs/search.md shows which edits each threshold finds.",
        ),
    ] = 0.96,
    keep: Annotated[
        Keep,
        typer.Option(
            help="Which photograph of a group to keep. pixels: most pixels, then the largest file, then the oldest. "
            "size: the largest file, then most pixels, then the oldest. oldest, newest: by the file's time."
        ),
    ] = Keep.pixels,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the groups and their pairs as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a line for each photograph of a group.")] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a self-contained page to look through the groups."),
    ] = None,
) -> None:
    """Group near-duplicate photographs and say which one of each group to keep. Nothing is deleted.

    A group is connected by pairs whose cosine is at least the threshold. Without --json, --csv and --html the groups
    are listed on stdout. Relative paths start from the current folder.

    Exit codes: 0 done, 2 usage.
    """
    with _exit_on_errors(), StatusOutput(shows_bar=True) as status:
        require_pillow()
        library = read_library(library_file)
        checked = grouping.check_files(library)
        if checked.missing and not checked.files:
            exit_with(
                USAGE,
                f"none of the {len(library.images):,} files of {library_file} exists: run this in the folder that "
                "clip-embed ran in, because relative paths start from the current folder",
            )
        included = np.zeros(len(library.images), np.bool_)
        included[list(checked.files)] = True
        pairs = pairs_above(library.embeddings, threshold, included=included, advance=status.set_progress)
        rows = sorted(set(pairs.first.tolist()) | set(pairs.second.tolist()))
        thumbnail_px = gallery.thumbnail_px(len(rows)) if html else None
        paths = [library.images[row].path for row in rows]
        previews = {}
        for row, preview in zip(rows, read_previews(paths, thumbnail_px=thumbnail_px), strict=True):
            previews[row] = preview
            status.set_progress(len(previews) / len(rows))
        groups = grouping.make_groups(library, pairs, checked.files, previews, keep)
        about = (
            f"{len(groups):,} groups of {len(rows):,} photographs, by {pairs.total:,} pairs of a cosine of {threshold} "
            f"or more among {len(checked.files):,} of {library_file}"
        )
        if html:
            with _text_file(html) as file:
                gallery.write_gallery(
                    groups, file, threshold=threshold, about=_with_provenance(about, library.provenance)
                )
        if json_file:
            provenance = library.provenance and json.loads(library.provenance.to_json())
            with _text_file(json_file) as file:
                grouping.write_json(
                    groups, file, library=str(library_file), provenance=provenance, threshold=threshold, keep=keep,
                    compared=len(checked.files), pairs=pairs.total,
                )  # fmt: skip
        if csv_file:
            with _text_file(csv_file) as file:
                grouping.write_csv(groups, file)
        if not (html or json_file or csv_file):
            _print_groups(groups)
        if left_out := ", ".join(_left_out(checked)):
            status.print(f"left out: {left_out}")
        _warn_missing(previews.values())
        if pairs.total > MOST_PAIRS:
            status.print(f"of {pairs.total:,} pairs, only those are kept that connect the groups at every threshold")
        status.print(about)


def _is_image(query: str) -> bool:
    """Whether a query is the path of an image. Exits for a path of an image that does not exist."""
    path = Path(query)
    try:
        if path.is_file():
            return True
    except (OSError, ValueError):
        return False
    if path.suffix.lower() in IMAGE_SUFFIXES:
        exit_with(USAGE, f"{query}: no such file")
    return False


def _check_weights(library: Library, served: Provenance | None) -> str | None:
    """A warning about the library's and the server's weights, or None. Exits if they differ."""
    if library.provenance is None:
        return (
            f"{library.path} does not name the weights of its vectors, as files of earlier versions do not. If they "
            "are not the server's, the cosines mean nothing"
        )
    if served is None:
        return f"the server does not name its weights; those of {library.path} are {library.provenance}"
    if not library.provenance.has_weights_of(served):
        exit_with(
            USAGE,
            f"{library.path} has vectors of {library.provenance}, but the server has {served}: serve the "
            "same weights, or embed the library again",
        )
    if library.provenance not in (served, served.of_texts()):
        return f"{library.path} was made with preprocess {library.provenance.preprocess}, the query {served.preprocess}"
    return None


def _print_results(found: list[tuple[str, float]], listing: Listing) -> None:
    """Print the results to stdout."""
    if listing is Listing.jsonl:
        for path, cosine in found:
            sys.stdout.write(json.dumps({"path": printable(path), "cosine": round(cosine, 6)}) + "\n")
        return
    table = Table("cosine", "path", box=None)
    for path, cosine in found:
        table.add_row(f"{cosine:.4f}", printable(path))
    Console(markup=False, emoji=False, highlight=False, soft_wrap=True).print(table)


def _with_provenance(about: str, provenance: Provenance | None) -> str:
    return f"{about}; {provenance}" if provenance else about


def _print_groups(groups: list[grouping.Group]) -> None:
    for group in groups:
        for place, member in enumerate(group.members):
            similarity = "keep  " if place == 0 else f"{member.similarity:.4f}"
            sys.stdout.write(f"{similarity}  {printable(member.file.path)}\n")
        sys.stdout.write("\n")


def _left_out(checked: grouping.FileCheck) -> Iterator[str]:
    if checked.missing:
        yield f"{checked.missing:,} that no longer exist (clip-embed --resume --prune drops their rows)"
    if checked.changed:
        yield f"{checked.changed:,} that have changed since (clip-embed --resume embeds them again)"
    if checked.failed:
        yield f"{checked.failed:,} that failed and have no vector"
    if checked.same_file:
        yield f"{checked.same_file:,} that are other names of the same files"


def _warn_missing(previews: Iterable[Preview]) -> None:
    if unread := sum(preview.width == 0 for preview in previews):
        sys.stderr.write(
            f"without thumbnail and size in pixels: {unread:,} that do not exist or that Pillow cannot read; "
            "relative paths start from the current folder\n"
        )


@contextmanager
def _text_file(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces `path` when it is complete."""
    # The module needs a system with flock.
    from clip_embed.atomic_file import is_special, lock_parts, replace_atomically, resolve_link

    path = resolve_link(path)
    if is_special(path):
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    with lock_parts(path) as folder, replace_atomically(path, folder) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        yield file
        file.detach()  # also flushes it


@contextmanager
def _exit_on_errors() -> Iterator[None]:
    try:
        yield
    except FATAL_ERRORS as error:
        exit_with(NO_SERVER, one_line(error))
    except EmbeddingError as error:
        exit_with(SOME_FAILED, one_line(error))
    except (UnusableOutput, ModuleNotFoundError) as error:
        exit_with(USAGE, one_line(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        exit_with(USAGE, f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
