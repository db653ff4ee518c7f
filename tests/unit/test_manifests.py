"""A model file that does not match its manifest is not loaded."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clip_tools import cli, digest
from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError
from clip_tools.export.export_onnx import make_manifest
from clip_tools.export.manifest import GRAPH
from clip_tools.oracle import Weights
from clip_tools.paths import MODELS
from clip_tools.repository import deployment, text_deployment
from clip_tools.serving.manifests import check_manifests, check_towers, wrong_file


@pytest.fixture
def models(tmp_path):
    """A model repository with two graphs, each with a manifest."""
    folder = tmp_path / "models"
    shutil.copytree(MODELS, folder, ignore=shutil.ignore_patterns("*.onnx", "*.plan", "manifest*.json", "__pycache__"))
    for name, manifest in (("model.onnx", "manifest.json"), ("model.fp16.onnx", "manifest.fp16.json")):
        file = folder / "clip_onnx" / "1" / name
        file.write_text(name)
        file.with_name(manifest).write_text(json.dumps({"sha256": sha256_of(file)}))
    return folder


def test_files_that_match_their_manifests_are_accepted_silently(models):
    said = []
    for name in (None, "ort-fp16"):
        check_manifests(deployment(models, name), said.append)
    assert said == []


@pytest.mark.parametrize(
    ("config_name", "file", "command"),
    [
        (None, "model.onnx", "clip-tools export-onnx`"),
        ("ort-fp16", "model.fp16.onnx", "clip-tools export-onnx --precision fp16`"),
    ],
)
def test_a_file_that_does_not_match_is_refused_with_both_sha256_and_the_command(models, config_name, file, command):
    path = models / "clip_onnx" / "1" / file
    expected = sha256_of(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ToolError) as caught:
        check_manifests(deployment(models, config_name))
    for words in ("clip_onnx: ", str(path), expected, sha256_of(path), command, "replaced"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    check_manifests(deployment(models, {None: "ort-fp16", "ort-fp16": None}[config_name]))  # the other file is intact


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"sha256": null}'])
def test_a_manifest_without_a_sha256_is_refused(models, content):
    (models / "clip_onnx" / "1" / "manifest.json").write_text(content)
    assert wrong_file(models / "clip_onnx" / "1" / "model.onnx")


def test_a_file_without_a_manifest_is_reported_as_unchecked(models):
    (models / "clip_onnx" / "1" / "manifest.json").unlink()
    said = []
    check_manifests(deployment(models), said.append)
    (line,) = said
    assert "model.onnx has no manifest.json" in line


@pytest.mark.parametrize(("graph", "lines"), [(GRAPH, 0), (GRAPH - 1, 1)])
def test_a_graph_of_an_earlier_version_is_accepted_and_reported_as_slower(models, graph, lines):
    file = models / "clip_onnx" / "1" / "model.onnx"
    manifest = make_manifest(file, Weights("ViT-B-32", "random:0"), "fp32", 1.0, 0.0)
    file.with_name("manifest.json").write_text(replace(manifest, graph=graph).to_json())
    said = []
    check_manifests(deployment(models), said.append)
    assert len(said) == lines
    assert all("`clip-tools export-onnx` makes a faster one" in line for line in said)


@pytest.mark.parametrize(
    ("image", "text", "refused"),
    [
        ("random:0", "random:0", False),
        ("random:0", "random:1", True),
        (None, "random:1", False),
        ("tag", "random:0", True),
    ],
)
def test_image_and_text_towers_of_different_weights_are_refused(models, image, text, refused):
    """Without both manifests nothing is checked."""
    for name, pretrained in (("clip_onnx", image), ("clip_text_onnx", text)):
        file = models / name / "1" / "model.onnx"
        file.write_text("graph")
        file.with_name("manifest.json").unlink(missing_ok=True)
        if pretrained:
            manifest = make_manifest(file, Weights("ViT-B-32", pretrained), "fp32", 1.0, 0.0)
            file.with_name("manifest.json").write_text(manifest.to_json())
    towers = deployment(models), text_deployment(models)
    if not refused:
        check_towers(*towers)
        return
    with pytest.raises(
        ToolError, match=rf"clip_onnx is of ViT-B-32 {image} and clip_text_onnx of ViT-B-32 {text}.*remove"
    ):
        check_towers(*towers)


@pytest.mark.parametrize(("name", "file"), [("onnx", "clip_onnx/1/model.onnx"), ("trt", "clip_trt/1/model.plan")])
def test_swap_refuses_a_file_that_does_not_match_before_it_asks_the_server(models, name, file):
    path = models / file
    path.write_text("another")
    path.with_name("manifest.json").write_text(json.dumps({"sha256": "0" * 64}))
    done = CliRunner().invoke(cli.app, ["swap", name, f"--models={models}", "--url=grpc://localhost:1"])
    assert isinstance(done.exception, ToolError)
    assert f"{path} is not the file that manifest.json describes" in str(done.exception)


def test_a_file_is_read_again_only_when_it_has_changed(models, monkeypatch):
    """So a server that died is replaced at once. A change is noticed even if the file's mtime was set back."""
    read, path, file_digest = [], models / "clip_onnx" / "1" / "model.onnx", hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, new: read.append(Path(file.name)) or file_digest(file, new)
    )
    digest._sum_of.cache_clear()  # the fixture has filled it
    assert [wrong_file(path), wrong_file(path)] == [None, None]
    assert read == [path]
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "is not the file that manifest.json describes" in wrong_file(path)
