"""A graph over protobuf's limit of 2 GB has its weights in a second file. Here a small graph is written that way."""

import shutil

import pytest
from tests.conftest import TINY, options_for, with_image

from clip_embed import EmbeddingClient
from clip_tools.digest import data_path, files_of, sha256_of
from clip_tools.errors import ToolError
from clip_tools.export.export_onnx import export_onnx
from clip_tools.export.manifest import Manifest, is_exported, manifest_path, put_in_place
from clip_tools.measuring.variants import Variant, write_repository
from clip_tools.repository import deployment
from clip_tools.serving.manifests import check_manifests
from clip_tools.serving.serve import EmbeddedServer

LARGEST_BYTES = 1 << 18


@pytest.fixture(scope="module")
def in_two_files(tiny_oracle, demo_photos, tmp_path_factory):
    path, photographs = tmp_path_factory.mktemp("two") / "model.onnx", [photo.read_bytes() for photo in demo_photos[:2]]
    export_onnx(TINY, photographs, path, oracle=tiny_oracle, largest_bytes=LARGEST_BYTES)
    assert path.stat().st_size < LARGEST_BYTES < data_path(path).stat().st_size
    return path


def test_it_is_served_from_links_to_both_files(in_two_files, tiny_oracle, demo_photos, tmp_path):
    """ONNX Runtime 1.24.1 and the `onnx` package refuse weights behind a link, which a measured variant has."""
    images = [photo.read_bytes() for photo in demo_photos[:3]]
    models = with_image(tmp_path / "models", in_two_files)
    options = options_for(
        write_repository(Variant(), tmp_path / "variant", models), tmp_path / "log", check_vectors=True
    )
    with EmbeddedServer(options) as server, EmbeddingClient(options.grpc_url) as client:
        assert "the vectors match open_clip's" in server.check_result
        got, expected = client.embed(images), tiny_oracle.embed(images)
    assert (got * expected).sum(axis=1).min() >= 0.99999


def test_the_manifest_covers_both_files(in_two_files, tmp_path):
    path = tmp_path / "models" / "clip_onnx" / "1" / "model.onnx"
    models = with_image(tmp_path / "models", in_two_files)
    for file in (path, data_path(path)):
        file.unlink()
        shutil.copy(in_two_files.with_name(file.name), file)
    assert is_exported(path, TINY)
    assert Manifest.read(path).sha256 == sha256_of(path)
    check_manifests(deployment(models))
    with data_path(path).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert not is_exported(path, TINY)
    with pytest.raises(ToolError, match=r"model.onnx is not the file that manifest.json describes"):
        check_manifests(deployment(models))
    data_path(path).unlink()
    with pytest.raises(ToolError, match=r"model.onnx is not the file that manifest.json describes"):
        check_manifests(deployment(models))


def test_a_small_export_in_its_place_removes_the_second_file(in_two_files, light_model, tmp_path):
    draft, placed = tmp_path / "draft" / "model.onnx", tmp_path / "placed" / "model.onnx"
    for folder in (draft.parent, placed.parent):
        folder.mkdir()
    for source in (in_two_files, light_model):
        for file in files_of(source):
            shutil.copy(file, draft.with_name(file.name))
        put_in_place(draft, Manifest.read(source), placed)
        assert data_path(placed).is_file() == (source == in_two_files)
        assert sha256_of(placed) == Manifest.read(placed).sha256
    assert sorted(path.name for path in placed.parent.iterdir()) == [manifest_path(placed).name, "model.onnx"]
