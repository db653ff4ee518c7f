"""The named configurations that choose an engine: their settings, and their description in docs/engines.md."""

import re
import shutil

import pytest
from google.protobuf import json_format

from clip_tools.errors import ToolError
from clip_tools.paths import MODELS, ROOT
from clip_tools.repository import check_files, config_names, deployment, engine_of, read_config
from clip_tools.serving.engine import Engine, has_exact_pixels
from clip_tools.serving.machine import Machine
from ort_bound import bucket_sizes
from ort_session import session_settings

SECTION = (ROOT / "docs" / "engines.md").read_text().split("## Choosing and swapping the engine")[1].split("\n## ")[0]


def engine(config_name: str | None):
    """The model that computes the embeddings in this deployment."""
    return engine_of(deployment(MODELS, config_name))


def settings_of(config_name: str, kind: str):
    config = json_format.MessageToDict(engine(config_name).config, preserving_proto_field_name=True)
    return session_settings(config, kind, 0)


def buckets(config) -> list[int]:
    return [warmup.batch_size for warmup in config.model_warmup]


def test_the_documented_table_lists_every_configuration_and_no_other():
    named = re.findall(r"^\| `([a-z0-9-]+)` \|", SECTION, re.MULTILINE)
    assert sorted(named) == config_names(MODELS)


def test_all_configurations_except_fast_and_gpu_have_exact_pixels():
    near = [name for name in config_names(MODELS) if not has_exact_pixels(Engine(config_name=name, models=MODELS))]
    assert near == ["fast", "gpu"]
    assert has_exact_pixels(Engine(models=MODELS))


def test_the_documented_commands_use_existing_verbs_and_options():
    import typer

    from clip_tools.cli import app

    verbs = typer.main.get_command(app).commands
    lines = re.findall(r"^    \.venv/bin/clip-tools (.*?)(?: +#.*)?$", SECTION, re.MULTILINE)
    assert len(lines) == 5
    for verb, *words in map(str.split, lines):
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
    assert {line.split()[1] for line in lines if line.startswith("swap")} <= set(config_names(MODELS))


def test_onnx_is_the_name_of_the_default_configuration():
    assert read_config(MODELS, "clip_ensemble", "onnx") == read_config(MODELS, "clip_ensemble")
    assert [model.config for model in deployment(MODELS, "onnx")] == [model.config for model in deployment(MODELS)]


@pytest.mark.parametrize(
    ("name", "model", "file"),
    [
        ("onnx", "clip_onnx", "model.onnx"),
        ("trt", "clip_trt", "model.plan"),
        ("ort-fp16", "clip_onnx", "model.fp16.onnx"),
        ("ort-trt", "clip_onnx", "model.fp16.onnx"),
        ("cpu-fp32", "clip_onnx", "model.onnx"),
        ("cpu-bf16", "clip_onnx", "model.onnx"),
    ],
)
def test_each_name_runs_its_own_model_and_file(name, model, file):
    assert engine(name).name == model
    assert engine(name).file.name == file


def test_ort_trt_sets_the_profile_caches_and_precision_of_onnx_runtime():
    (provider, options), (fallback, _), _ = settings_of("ort-trt", "GPU").providers
    assert (provider, fallback) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    sizes = {key: options[f"trt_profile_{key}_shapes"] for key in ("min", "opt", "max")}
    assert sizes == {"min": "pixels:1x224x224x3", "opt": "pixels:16x224x224x3", "max": "pixels:64x224x224x3"}
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == ".cache/ort-trt"


@pytest.mark.parametrize("name", ["onnx", "ort-fp16", "trt", "ort-trt"])
def test_each_gpu_engine_is_warmed_up_with_every_batch_size_of_the_embedded_server(name):
    config = engine(name).config
    Machine(cores=16, has_gpu=True).apply_to(config)
    assert buckets(config) == bucket_sizes(config.max_batch_size)
    for warmup in config.model_warmup:
        assert {key: list(entry.dims) for key, entry in warmup.inputs.items()} == {"pixels": [224, 224, 3]}


def test_the_cuda_graphs_cover_every_batch_once_and_each_is_warmed_up():
    config = engine("trt").config
    covered = []
    for spec in config.optimization.cuda.graph_spec:
        low = spec.graph_lower_bound.batch_size or spec.batch_size
        covered += range(low, spec.batch_size + 1)
        assert list(spec.input["pixels"].dim) == [224, 224, 3]
    assert covered == list(range(1, config.max_batch_size + 1))
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == buckets(config)
    assert set(config.dynamic_batching.preferred_batch_size) < set(buckets(config))


def test_no_configuration_for_a_gpu_has_a_cpu_accelerator():
    """Triton's native ONNX Runtime backend would add it on a GPU too."""
    looked = []
    for path in [*MODELS.glob("*/config.pbtxt"), *MODELS.glob("*/configs/*.pbtxt")]:
        config = read_config(MODELS, path.relative_to(MODELS).parts[0], path.stem)
        if config.backend == "onnxruntime" and any(group.kind != group.KIND_CPU for group in config.instance_group):
            looked.append(path.stem)
            assert not config.optimization.execution_accelerators.cpu_execution_accelerator, path
    assert {"config", "ort-fp16", "ort-trt"} <= set(looked)


@pytest.mark.parametrize("name", ["onnx", "ort-fp16"])
def test_the_cuda_provider_uses_cuda_graphs_and_heuristic_convolution_search(name):
    settings = settings_of(name, "GPU")
    assert settings.graphs
    assert settings.providers[0][1]["cudnn_conv_algo_search"] == "HEURISTIC"


def test_fp32_on_a_gpu_is_not_tf32():
    assert settings_of("onnx", "GPU").providers[0][1]["use_tf32"] == "0"


def test_a_missing_fp16_graph_names_the_command_that_makes_it(tmp_path):
    models = tmp_path / "models"
    shutil.copytree(MODELS, models, ignore=shutil.ignore_patterns("*.onnx"))
    with pytest.raises(ToolError, match=r"model.fp16.onnx.*`clip-tools export-onnx --precision fp16`"):
        check_files(deployment(models, "ort-fp16"))
