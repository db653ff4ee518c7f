"""`clip-tools embed-dataset`: embeds a library larger than one machine to Parquet, as a Ray Data job.

One task embeds and writes one part: the images of a WebDataset shard, of a Parquet file, or of some image files. Only
file names go through Ray, so its object store stays empty; the actor that sends the images reads them.
"""

import json
import os
import socket
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from itertools import tee
from pathlib import Path, PurePosixPath
from typing import Any

from clip_embed import parquet
from clip_embed.client import EmbeddingClient
from clip_embed.credentials import environment_options
from clip_embed.errors import EmbeddingError, InvalidImageError
from clip_embed.file_listing import IMAGE_SUFFIXES, FileListing
from clip_embed.provenance import Provenance
from clip_embed.table import ImageFile, stat_image
from clip_embed.terminal import FATAL_ERRORS, NO_SERVER, SOME_FAILED, USAGE, one_line
from clip_embed.wire import MAX_IMAGE_BYTES
from clip_tools.errors import ToolError, needs_extra
from clip_tools.progress import Tell, silent

_CONTAINERS = frozenset((".tar", ".parquet"))
_OBJECT_STORE_BYTES = 100 << 20  # for a Ray that is started here: it holds file names only
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Place:
    """A folder of a pyarrow file system. `prefix` makes a URI of its paths; empty for the local file system."""

    files: Any
    path: str
    prefix: str

    @classmethod
    def of(cls, uri: str) -> "Place":
        """The place of a path or URI. Raises ToolError for a URI that pyarrow does not know."""
        with needs_extra("ray"):
            from pyarrow import ArrowException, fs
        scheme, is_uri, _ = uri.partition("://")
        if not is_uri:
            return cls(fs.LocalFileSystem(), os.path.abspath(uri), "")  # noqa: PTH100  Path.resolve follows links
        try:
            files, path = fs.FileSystem.from_uri(uri)
        except (ArrowException, OSError) as error:
            raise ToolError(f"{uri}: {one_line(error)}", exit_code=USAGE) from error
        return cls(files, path, "" if scheme == "file" else f"{scheme}://")

    def inside(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"


@dataclass(frozen=True)
class Job:
    """The parameters of every actor."""

    source: Place
    destination: Place
    client: Mapping[str, Any]
    models: Path | None  # the model repository that the actors run, instead of servers
    provenance: Provenance | None
    suffixes: frozenset[str]
    size: int  # of a vector
    image_column: str


@dataclass
class Done:
    """The counts and source files of the finished parts."""

    parts: int = 0
    images: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    files: dict[str, ImageFile] = field(default_factory=dict)

    def add(self, notes: Mapping[str, Any]) -> None:
        self.parts += 1
        self.images += notes["images"]
        self.failed += notes["failed"]
        self.skipped.update(notes["not_taken"])
        self.files.update((one[0], ImageFile(*one)) for one in notes["files"])


def embed_dataset(
    source: str,
    destination: str,
    *,
    url: str,
    models: Path | None = None,
    address: str | None = None,
    actors: int | None = None,
    part_images: int = 1000,
    image_column: str = "image",
    timeout_s: float = 300.0,
    say: Callable[[str], object],
    tell: Tell = silent,
) -> Done:
    """Write the missing parts of the source; the counts of all parts.

    The actors run the model repository `models`, if given, instead of calling servers. Raises ToolError if the job
    stops; finished parts stay, and the next run continues.
    """
    with needs_extra("ray"):
        import ray.data
        import ray.exceptions
    sources, target = Place.of(source), Place.of(destination)
    client = {"urls": url.split(","), "timeout_s": timeout_s, **environment_options(os.environ)}
    provenance, suffixes, size = _ask(client, models)
    job = Job(sources, target, client, models, provenance, suffixes, size, image_column)
    done, listing = Done(), FileListing(suffixes=suffixes | _CONTAINERS)
    try:
        target.files.create_dir(target.path)
        for notes in _finished(job):
            done.add(notes)
        found = [file for file in _listed(sources, listing) if not file.path.startswith(target.inside(""))]
    except OSError as error:
        raise ToolError(one_line(error), exit_code=USAGE) from error
    if not found:
        raise ToolError(f"{source}: no images, .tar or .parquet files found", exit_code=USAGE)
    if changed := [file.path for file in found if done.files.get(file.path, file) != file]:
        raise ToolError(
            f"{len(changed)} files have changed since their part was written, {changed[0]} first: give another "
            f"destination, or remove the parts of {destination} that hold them",
            exit_code=USAGE,
        )
    done.skipped.update(listing.skipped)
    done.skipped.update({"litter": listing.litter.total(), "links to folders": listing.linked_folders})
    if done.parts:
        say(f"{done.images:,} images in {done.parts:,} parts exist already")
    parts = _parts([file for file in found if file.path not in done.files], part_images)
    if not parts:
        return done
    try:
        _start(ray, address)
        actors = actors or sum(node["Alive"] for node in ray.nodes())
        for count, part in enumerate(_run(ray.data, job, parts, actors), 1):
            if part["stopped"]:
                raise ToolError(f"{part['stopped']}; the finished parts stay: run it again", exit_code=part["code"])
            done.add(json.loads(part["notes"]))
            tell("parts", count, len(parts))
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        advice = "give Ray more memory, or fewer --actors" if "memory" in str(error) else "see `ray status`"
        raise ToolError(f"Ray: {one_line(error)[:500]}; {advice}; the finished parts stay") from error
    finally:
        ray.shutdown()
    _check_all_are_there(job, parts)
    return done


def _open_client(options: Mapping[str, Any], models: Path | None) -> EmbeddingClient:
    if models is None:
        return EmbeddingClient(**options)
    from clip_tools.local_transport import LocalTransport

    return EmbeddingClient(transport=LocalTransport(models))


def _ask(client: Mapping[str, Any], models: Path | None) -> tuple[Provenance | None, frozenset[str], int]:
    """The provenance of the servers' vectors, the file suffixes that they accept, and the length of a vector."""
    import numpy as np

    with _open_client({**client, "timeout_s": 10.0}, models) as one:
        try:
            if not one.is_ready():
                raise ToolError(f"no server at {one.url}: start it (make serve), or give --url", exit_code=NO_SERVER)
            served = one.served()
            size = one.embed([np.zeros((8, 8, 3), np.uint8)]).shape[1]
        except EmbeddingError as error:
            raise ToolError(one_line(error), exit_code=NO_SERVER) from error
    return served.provenance, served.suffixes or IMAGE_SUFFIXES, size


def _finished(job: Job) -> Iterator[dict[str, Any]]:
    """The notes of each existing part. Raises ToolError for a part of other weights, or another Parquet file."""
    from pyarrow import fs

    for info in job.destination.files.get_file_info(fs.FileSelector(job.destination.path)):
        if info.base_name.endswith(_UNFINISHED):  # of a process that was killed
            job.destination.files.delete_file(info.path)
        elif info.base_name.endswith(".parquet"):
            with job.destination.files.open_input_file(info.path) as file:
                notes, provenance = parquet.read_notes(file)
            if notes is None:
                raise ToolError(f"{info.path} is not a part: give a folder for the parts alone", exit_code=USAGE)
            if provenance != job.provenance:
                raise ToolError(
                    f"{info.path} has vectors of {provenance}, and the server gives those of {job.provenance}: give "
                    "another destination",
                    exit_code=USAGE,
                )
            yield json.loads(notes)


def _listed(source: Place, listing: FileListing) -> Iterator[ImageFile]:
    """The files to embed, in order. A local folder is searched as clip-embed does."""
    from pyarrow import fs

    root = source.files.get_file_info(source.path)
    if root.type is fs.FileType.NotFound:
        raise ToolError(f"{source.prefix}{source.path}: no such file or folder", exit_code=USAGE)
    if not source.prefix:
        yield from map(stat_image, listing.paths([source.path], BytesIO()))
        return
    is_file = root.type is fs.FileType.File
    infos = [root] if is_file else source.files.get_file_info(fs.FileSelector(source.path, recursive=True))
    for info in sorted(infos, key=lambda one: one.path):
        if info.type is not fs.FileType.Directory and (is_file or listing.accepts(info.base_name)):
            yield ImageFile(source.prefix + info.path, info.size, info.mtime_ns)


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _parts(files: Iterable[ImageFile], part_images: int) -> list[tuple[ImageFile, ...]]:
    """The files of each part: one container, or up to `part_images` image files."""
    parts, images = [], []
    for file in files:
        if _suffix(file.path) in _CONTAINERS:
            parts.append((file,))
        else:
            images.append(file)
    return parts + [tuple(images[at : at + part_images]) for at in range(0, len(images), part_images)]


def _name(files: tuple[ImageFile, ...]) -> str:
    """The part's file name: a digest of its files, so that a task that Ray runs twice writes the same part."""
    return f"part-{sha256(json.dumps(files).encode()).hexdigest()[:24]}.parquet"


def _start(ray: Any, address: str | None) -> None:
    """Connect to the cluster, or start one here, without usage reports. Raises ToolError if no cluster answers."""
    import logging

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it writes harmless messages to stderr
    address = address or os.environ.get("RAY_ADDRESS")
    _, _, place = (address or "").rpartition("://")
    host, _, port = place.rpartition(":")
    if host and port.isdigit():  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ToolError(f"no Ray cluster at {address}: {one_line(error)}; see `ray status` there") from error
    here = {} if address else {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)


def _run(data: Any, job: Job, parts: list[tuple[ImageFile, ...]], actors: int) -> Iterator[dict[str, Any]]:
    """The result of each part, as they finish. Ray starts the actors of a lost machine on another one."""
    import logging

    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a large shard on a slow server takes long
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    files = [{"files": json.dumps(part)} for part in parts]
    yield from (
        data.from_items(files, override_num_blocks=len(files))
        .map(
            _Embedder,
            fn_constructor_args=(job,),
            # Two: one is embedded, the next one is waiting.
            compute=data.ActorPoolStrategy(size=min(actors, len(parts)), max_tasks_in_flight_per_actor=2),
            num_cpus=1,
        )
        .iter_rows()
    )


def _check_all_are_there(job: Job, parts: list[tuple[ImageFile, ...]]) -> None:
    from pyarrow import fs

    there = {info.base_name for info in job.destination.files.get_file_info(fs.FileSelector(job.destination.path))}
    if missing := [name for name in map(_name, parts) if name not in there]:
        raise ToolError(
            f"{len(missing)} of {len(parts)} parts were written but are not in {job.destination.path}: all machines "
            "of the cluster must see the same folder; give a shared one"
        )


class _Embedder:
    """A Ray actor with one client."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._client = _open_client(job.client, job.models)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The notes of the written or existing part, or why the job has to stop."""
        from pyarrow import ArrowException, fs

        job = self._job
        files = tuple(ImageFile(*one) for one in json.loads(row["files"]))
        path = job.destination.inside(_name(files))
        try:
            if job.destination.files.get_file_info(path).type is fs.FileType.NotFound:
                self._write(files, path)
            with job.destination.files.open_input_file(path) as file:
                notes, _ = parquet.read_notes(file)
        except EmbeddingError as error:
            return {"notes": "", "stopped": one_line(error), "code": NO_SERVER}
        except (ArrowException, OSError) as error:
            return {"notes": "", "stopped": f"{os.uname().nodename}: {one_line(error)}", "code": SOME_FAILED}
        return {"notes": notes, "stopped": "", "code": 0}

    def _write(self, files: tuple[ImageFile, ...], path: str) -> None:
        """Write a part under another name, then rename it."""
        job, skipped = self._job, Counter[str]()
        if job.source.files.get_file_info(job.source.path).type.name == "NotFound":
            raise OSError(f"{job.source.path} is not on this machine: the machines must share it")
        to_embed, to_name = tee(_images(job, files, skipped))
        images, results = [], []
        answers = self._client.embed_many(image for _, image in to_embed)
        for (image, _), result in zip(to_name, answers, strict=True):
            if isinstance(result, FATAL_ERRORS) or (isinstance(result, EmbeddingError) and result.retryable):
                raise result  # not the image's fault
            images.append(image)
            results.append(_reason(result) if isinstance(result, EmbeddingError) else result)
        failed = sum(isinstance(result, str) for result in results)
        notes = {"images": len(images), "failed": failed, "not_taken": skipped, "files": files}
        unfinished = f"{path}.{os.uname().nodename}.{os.getpid()}{_UNFINISHED}"
        with job.destination.files.open_output_stream(unfinished) as file:
            parquet.write_part(file, images, results, job.size, job.provenance, json.dumps(notes))
        job.destination.files.move(unfinished, path)


def _reason(error: object) -> str:
    if not isinstance(error, InvalidImageError):
        return f"{type(error).__name__}: {one_line(error)}"
    return ": ".join(filter(None, (error.failures[0].code, one_line(error.failures[0].reason))))


def _images(job: Job, files: Iterable[ImageFile], skipped: Counter[str]) -> Iterator[tuple[ImageFile, Any]]:
    """The images of these files, each with its source. A broken container ends with an unreadable image."""
    from pyarrow import ArrowException

    for file in files:
        path = file.path.removeprefix(job.source.prefix)
        try:
            if _suffix(path) == ".tar":
                yield from _in_shard(job, file, path, skipped)
            elif _suffix(path) == ".parquet":
                yield from _in_parquet(job, file, path)
            else:
                yield file, _File(job.source.files, path) if job.source.prefix else path
        except (tarfile.TarError, ArrowException, OSError, EOFError) as error:
            yield file, _Unreadable(one_line(error))


def _in_shard(job: Job, file: ImageFile, path: str, skipped: Counter[str]) -> Iterator[tuple[ImageFile, Any]]:
    with job.source.files.open_input_stream(path) as opened, tarfile.open(fileobj=opened, mode="r|") as shard:
        for member in shard:
            suffix = _suffix(member.name)
            if member.isfile() and suffix in job.suffixes:
                content = shard.extractfile(member).read(MAX_IMAGE_BYTES + 1)  # type: ignore[union-attr]
                yield ImageFile(f"{file.path}/{member.name}", member.size, file.mtime_ns), content
            elif member.isfile():
                skipped[suffix or "without an ending"] += 1


def _in_parquet(job: Job, file: ImageFile, path: str) -> Iterator[tuple[ImageFile, Any]]:
    """The column's values: bytes, or a struct with `bytes`, as in Hugging Face data sets."""
    from pyarrow import parquet as pq

    with job.source.files.open_input_file(path) as opened, pq.ParquetFile(opened) as table:
        if job.image_column not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise OSError(f"expected a column {job.image_column} (--image-column), got {columns}")
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=[job.image_column]):
            for value in batch.column(0).to_pylist():
                content = value.get("bytes") if isinstance(value, dict) else value
                size_bytes = len(content) if isinstance(content, bytes) else None
                image = content if size_bytes is not None else _Unreadable(f"expected bytes, got {type(content)}")
                yield ImageFile(f"{file.path}#{number}", size_bytes, file.mtime_ns), image
                number += 1


@dataclass
class _Unreadable:
    """An image that cannot be read, with the reason."""

    reason: str

    def read(self, size: int) -> bytes:
        raise OSError(self.reason)


@dataclass
class _File:
    """A file that is opened when it is read, so a missing file is one failed image."""

    files: Any
    path: str
    opened: Any = None

    def read(self, size: int) -> bytes:
        self.opened = self.opened or self.files.open_input_stream(self.path)
        content: bytes = self.opened.read(size)
        return content


def summary(done: Done, destination: str) -> str:
    """The last line of the output."""
    left_out = ", ".join(f"{count:,} {ending}" for ending, count in done.skipped.most_common() if count)
    skipped = f"; skipped: {left_out}" if left_out else ""
    return f"{done.images:,} images in {done.parts:,} parts of {Path(destination)}, {done.failed:,} failed{skipped}"
