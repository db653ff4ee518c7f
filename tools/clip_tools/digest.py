"""The sha256 of a file, for manifests and pins, and the files that belong to one model."""

import hashlib
from functools import lru_cache
from pathlib import Path


def data_path(graph: Path) -> Path:
    """The path of an ONNX graph's external data, `model.onnx.data`."""
    return graph.with_name(f"{graph.name}.data")


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, followed by the external data of an ONNX graph if it has any."""
    data = data_path(path)
    return (path, data) if path.suffix == ".onnx" and data.is_file() else (path,)


def sha256_of(path: Path) -> str:
    """The sha256 of a file in hexadecimal. With external data it covers both files, in the order of `files_of`.

    The result is cached until a file changes. A start of the server needs a model's digest several times, and that of
    ViT-B-32 takes 1.0 s on two cores.
    """
    parts = files_of(path)
    status = [part.stat() for part in parts]
    return _sum_of(parts, tuple((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in status))


@lru_cache(maxsize=16)
def _sum_of(parts: tuple[Path, ...], _status: tuple[tuple[int, ...], ...]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
