"""The sha256 of a file, for manifests and pins, and the files that belong to one model."""

import hashlib
from functools import lru_cache
from pathlib import Path


def data_path(graph: Path) -> Path:
    """Where an ONNX graph has its weights if they are too large for its own file: `model.onnx.data`."""
    return graph.with_name(f"{graph.name}.data")


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, and after an ONNX graph the file of its weights where it has one."""
    data = data_path(path)
    return (path, data) if path.suffix == ".onnx" and data.is_file() else (path,)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; of an ONNX graph with its weights apart, of both files in turn.

    It is computed once while the files are unchanged: a start asks for that of a model several times, and a restart
    again. ViT-B-32's took 1.0 s each time on a CPU of two cores.
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
