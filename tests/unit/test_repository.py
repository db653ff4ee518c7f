"""The committed model repository keeps its contract, in every named configuration."""

import itertools
import shutil

import pytest

from clip_embed import wire
from clip_tools.errors import ToolError
from clip_tools.paths import MODELS
from clip_tools.repository import (
    ENSEMBLE,
    TEXT_ENSEMBLE,
    check_files,
    config_names,
    deployment,
    read_config,
    text_deployment,
)
from clip_tools.serving.server import repository_flags

NAMED = [None, *config_names(MODELS)]


def tensors(entries) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(entry.name, entry.data_type, tuple(entry.dims)) for entry in entries]


@pytest.mark.parametrize("root", [ENSEMBLE, TEXT_ENSEMBLE])
@pytest.mark.parametrize("config_name", NAMED)
def test_each_tensor_has_one_name_type_and_shape_from_end_to_end(config_name, root):
    *steps, ensemble = deployment(MODELS, config_name, root=root)
    assert tensors(ensemble.config.input) == tensors(steps[0].config.input)
    assert tensors(ensemble.config.output) == tensors(steps[-1].config.output)
    for before, after in itertools.pairwise(steps):
        assert tensors(before.config.output) == tensors(after.config.input)
    assert {model.config.max_batch_size for model in (*steps, ensemble)} == {64}


@pytest.mark.parametrize("root", [ENSEMBLE, TEXT_ENSEMBLE])
@pytest.mark.parametrize("config_name", NAMED)
def test_every_queue_has_a_limit_and_room_for_64_clients(config_name, root):
    *steps, _ = deployment(MODELS, config_name, root=root)
    for model in steps:
        policy = model.config.dynamic_batching.default_queue_policy
        assert 64 < policy.max_queue_size <= 128
        assert 0 < policy.default_timeout_microseconds <= 30_000_000


@pytest.mark.parametrize("config_name", NAMED)
def test_clip_onnx_and_clip_trt_have_the_same_tensors(config_name):
    onnx, trt = (read_config(MODELS, name, config_name) for name in ("clip_onnx", "clip_trt"))
    assert tensors(onnx.input) == tensors(trt.input)
    assert tensors(onnx.output) == tensors(trt.output)


def test_the_client_uses_the_ensembles_tensors():
    ensemble = read_config(MODELS, "clip_ensemble")
    assert [entry.name for entry in ensemble.input] == [wire.INPUT]
    assert [entry.name for entry in ensemble.output] == [wire.OUTPUT]
    assert list(ensemble.output[0].dims) == [wire.EMBEDDING_SIZE]
    texts = read_config(MODELS, wire.TEXT_MODEL)
    assert [entry.name for entry in texts.input] == [wire.TEXT_INPUT]
    assert tensors(texts.output) == tensors(ensemble.output)
    limits = read_config(MODELS, "preprocess").parameters
    assert limits["max_image_bytes"].string_value == str(wire.MAX_IMAGE_BYTES)


def test_trt_routes_through_clip_trt_and_the_default_through_clip_onnx():
    assert [model.name for model in deployment(MODELS)] == ["preprocess", "clip_onnx", "clip_ensemble"]
    assert [model.name for model in deployment(MODELS, "trt")] == ["preprocess", "clip_trt", "clip_ensemble"]


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [("fast", "mode", "fast"), ("gpu", "mode", "gpu"), ("upright", "orientation", "exif")],
)
def test_each_preprocess_configuration_is_the_exact_one_but_for_one_parameter(name, parameter, value):
    exact, other = (read_config(MODELS, "preprocess", config) for config in (None, name))
    assert other.parameters[parameter].string_value == value
    other.parameters[parameter].string_value = {"mode": "exact", "orientation": "ignore"}[parameter]
    for config in (exact, other):
        del config.instance_group[:]  # mode gpu decodes on the GPU, in whole batches
        del config.dynamic_batching.preferred_batch_size[:]
        config.dynamic_batching.max_queue_delay_microseconds = 0
    assert other == exact


def test_texts_are_served_if_the_text_tower_was_exported(tmp_path):
    models = tmp_path / "models"
    shutil.copytree(MODELS, models, ignore=shutil.ignore_patterns("*.onnx"))
    assert not any(TEXT_ENSEMBLE in flag for flag in repository_flags(models, None))
    (models / "clip_text_onnx" / "1" / "model.onnx").touch()
    assert [model.name for model in text_deployment(models)] == ["tokenize", "clip_text_onnx", TEXT_ENSEMBLE]
    assert f"--load-model={TEXT_ENSEMBLE}" in repository_flags(models, None)


def test_an_unknown_configuration_name_lists_the_known():
    with pytest.raises(ToolError, match=r"'fp12'.*cpu-bf16.*trt"):
        deployment(MODELS, "fp12")


def test_a_missing_model_file_names_the_command_that_makes_it(tmp_path):
    models = tmp_path / "models"
    shutil.copytree(MODELS, models, ignore=shutil.ignore_patterns("*.onnx"))
    with pytest.raises(ToolError, match=r"clip_onnx needs .*model.onnx.*clip-tools export-onnx"):
        check_files(deployment(models))


@pytest.mark.parametrize("config_name", [None, "trt"])
def test_a_folder_that_is_no_model_repository_is_refused(tmp_path, config_name):
    with pytest.raises(ToolError, match=r"expected a model repository"):
        deployment(tmp_path, config_name)
