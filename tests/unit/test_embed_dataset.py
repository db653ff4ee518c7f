"""The parts that `clip-tools embed-dataset` reads and writes, without Ray. tests/e2e/test_ray.py runs whole jobs."""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from clip_embed import parquet
from clip_embed.file_listing import FileListing
from clip_embed.library import read_library
from clip_embed.provenance import Provenance
from clip_embed.table import ImageFile, UnusableOutput
from clip_tools.embed_dataset import Job, Place, _images, _listed
from clip_tools.paths import ROOT

pytest.importorskip("pyarrow.parquet", reason="pip install 'clip-embed[parquet]'")

VECTOR = np.eye(3, dtype=np.float32)
OURS = Provenance("ViT-B-32", "a" * 64, "exact")


def write(path, results, provenance=OURS):
    images = [ImageFile(f"{path.stem}/{index}.jpg", 1, 2) for index in range(len(results))]
    with path.open("wb") as file:
        parquet.write_part(file, images, results, 3, provenance, "{}")


def test_a_folder_of_parts_is_one_library_without_the_images_that_failed(tmp_path):
    write(tmp_path / "a.parquet", [VECTOR[0], "corrupt: why", VECTOR[1]])
    write(tmp_path / "b.parquet", ["empty"])
    write(tmp_path / "c.parquet", [VECTOR[2]])
    library = read_library(tmp_path)
    assert [image.path for image in library.images] == ["a/0.jpg", "a/2.jpg", "c/0.jpg"]
    assert np.array_equal(library.embeddings, VECTOR)
    assert library.provenance == OURS


def test_parts_of_different_weights_are_refused(tmp_path):
    write(tmp_path / "a.parquet", [VECTOR[0]])
    write(tmp_path / "b.parquet", [VECTOR[0]], Provenance("ViT-B-16", "b" * 64, "exact"))
    with pytest.raises(UnusableOutput, match="expected parts of the same weights"):
        read_library(tmp_path)


def test_clip_embed_cannot_resume_a_part(tmp_path):
    """Resuming would lose the errors in the part."""
    write(tmp_path / "a.parquet", ["empty"])
    with pytest.raises(UnusableOutput, match="expected the columns of clip-embed"):
        list(parquet.read_images(tmp_path / "a.parquet"))


def test_files_of_a_uri_are_listed_and_read_by_pyarrow(tmp_path):
    """pyarrow's local file system stands in for that of an object store."""
    fs = pytest.importorskip("pyarrow.fs")
    (tmp_path / "a").mkdir()
    for name in ("a/1.jpg", "a/2.txt", "a/._1.jpg"):
        (tmp_path / name).write_bytes(b"image")
    place, listing = Place(fs.LocalFileSystem(), str(tmp_path), "s3://"), FileListing()
    files = list(_listed(place, listing))
    assert [file.path for file in files] == [f"s3://{tmp_path}/a/1.jpg"]
    assert (listing.skipped, listing.litter) == ({".txt": 1}, {"file": 1})
    gone = ImageFile(f"s3://{tmp_path}/gone.jpg", None, None)
    job = Job(place, place, {}, None, None, frozenset(), 3, "image")
    (_, found), (_, not_there) = _images(job, [*files, gone], Counter())
    assert found.read(9) == b"image"
    with pytest.raises(FileNotFoundError):
        not_there.read(9)


def test_only_embed_dataset_imports_ray():
    code = "import clip_embed.cli, clip_tools.cli, clip_tools.embed_dataset, sys; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    importing = re.compile(r"^\s*(import|from) ray\b", re.MULTILINE)
    folders = ("client", "tools", "models", "backends")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if importing.search(path.read_text())]
    assert [path.name for path in files] == ["embed_dataset.py"]
