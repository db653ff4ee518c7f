"""How the start of a server adapts the model repository to its machine."""

import os
from pathlib import Path

import pytest

from clip_tools.paths import MODELS
from clip_tools.repository import deployment, read_config
from clip_tools.serving.machine import Machine, available_cores
from clip_tools.serving.served_repository import write_served_repository

GPU_HOST = Machine(cores=16, has_gpu=True)


def group(root: Path, path: str, limit: str, *, mine: str = "/a/b") -> Path:
    """A root folder where the cgroup at `path` has this `cpu.max`, and this process is in the cgroup at `mine`."""
    (root / "proc" / "self").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "self" / "cgroup").write_text(f"0::{mine}\n")
    folder = root / "sys" / "fs" / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(limit)
    return root


@pytest.mark.parametrize(
    ("path", "limit", "cores"),
    [
        ("a/b", "max 100000", 16),
        ("a/b", "400000 100000", 4),
        ("a", "150000 100000", 2),  # of the parent cgroup; half a core counts as one
        ("", "5000 100000", 1),
        ("a/c", "100000 100000", 16),  # of another process
        ("a/b", "6400000 100000", 16),
    ],
)
def test_available_cores_respect_the_cpu_limit_of_the_cgroup(tmp_path, monkeypatch, path, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert available_cores(group(tmp_path, path, limit)) == cores


def test_without_cgroups_available_cores_are_those_of_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert available_cores(tmp_path) == 2


@pytest.mark.parametrize(
    ("cores", "has_gpu", "instances"),
    [
        (1, False, 1),
        (2, False, 2),
        (8, False, 8),
        (1, True, 1),
        (2, True, 2),
        (4, True, 3),
        (16, True, 14),
        (64, True, 56),
    ],
)
def test_preprocess_gets_nearly_every_core(cores, has_gpu, instances):
    assert Machine(cores, has_gpu).preprocess_instances == instances


def count(models: Path, config_name: str | None = None) -> int:
    return (
        next(one.config for one in deployment(models, config_name) if one.name == "preprocess").instance_group[0].count
    )


@pytest.mark.parametrize("config_name", [None, "fast", "upright"])
def test_served_configurations_get_as_many_preprocess_instances_as_the_machine_allows(tmp_path, config_name):
    write_served_repository(MODELS, tmp_path / "models", GPU_HOST)
    assert count(tmp_path / "models", config_name) == 14
    assert count(MODELS, config_name) == 2
    assert GPU_HOST.describe_preprocess(MODELS, config_name) == "14 processes for preprocess on 16 cores"


def test_in_mode_gpu_preprocess_keeps_its_configured_instances_unless_the_user_sets_them(tmp_path):
    """Each process has a CUDA context and memory on the GPU; fourteen would fill it."""
    write_served_repository(MODELS, tmp_path / "models", GPU_HOST)
    assert count(tmp_path / "models", "gpu") == 4
    write_served_repository(MODELS, tmp_path / "others", Machine(16, has_gpu=True, instances=2))
    assert count(tmp_path / "others", "gpu") == 2


def test_the_served_repository_links_to_committed_files_and_to_later_ones(tmp_path):
    """Files that are built later appear. A configuration without changes is the committed file itself."""
    models, served = tmp_path / "models", tmp_path / "served"
    for name in ("preprocess", "clip_onnx"):
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text((MODELS / name / "config.pbtxt").read_text())
    write_served_repository(models, served, Machine(cores=3, has_gpu=False))
    (models / "clip_onnx" / "1" / "model.onnx").write_text("built later")
    assert (served / "clip_onnx" / "1" / "model.onnx").read_text() == "built later"
    assert (served / "clip_onnx" / "config.pbtxt").resolve() == models / "clip_onnx" / "config.pbtxt"
    assert "count: 3" in (served / "preprocess" / "config.pbtxt").read_text()
    assert "count: 2" in (models / "preprocess" / "config.pbtxt").read_text()


def test_a_tuned_instance_count_is_kept_unless_the_user_sets_one():
    tuned = read_config(MODELS, "preprocess")
    tuned.instance_group[0].ClearField("name")
    assert not GPU_HOST.apply_to(tuned)
    assert Machine(16, has_gpu=True, instances=5).apply_to(tuned)
    assert tuned.instance_group[0].count == 5


def test_an_engine_is_warmed_up_only_if_it_runs_on_a_gpu():
    on_cpu, on_gpu, kept_off = (read_config(MODELS, "clip_onnx", name) for name in (None, None, "cpu-fp32"))
    assert not Machine(cores=2, has_gpu=False).apply_to(on_cpu)
    assert GPU_HOST.apply_to(on_gpu)
    assert [warm_up.batch_size for warm_up in on_gpu.model_warmup] == [1, 2, 4, 8, 16, 32, 64]
    assert list(on_gpu.model_warmup[0].inputs["pixels"].dims) == [224, 224, 3]
    assert not GPU_HOST.apply_to(kept_off)
