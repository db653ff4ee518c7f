"""The sha256 of a file, for manifests and pins, and the files that belong to one model."""

import hashlib
from pathlib import Path


def data_path(graph: Path) -> Path:
    """Where an ONNX graph has its weights if they are too large for its own file: `model.onnx.data`."""
    return graph.with_name(f"{graph.name}.data")


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, and after an ONNX graph the file of its weights where it has one."""
    data = data_path(path)
    return (path, data) if path.suffix == ".onnx" and data.is_file() else (path,)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; of an ONNX graph with its weights apart, of both files in turn."""
    digest = hashlib.sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
