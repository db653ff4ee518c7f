"""How an exported model of another size changes the served configurations."""

from dataclasses import replace

import pytest

from clip_tools.export.manifest import Manifest
from clip_tools.paths import MODELS
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE, config_names, deployment, read_config
from clip_tools.serving.towers import Towers

DEFAULT = Manifest(
    **{"sha256": "", "model": "ViT-B-32", "pretrained": "random:0", "checkpoint_sha256": None, "trained": False},
    **{"precision": "fp32", "opset": 20, "max_batch": 64, "worst_cosine": 1.0, "max_abs_difference": 0.0},
    **{"versions": {}, "date": ""},
    tensors={"pixels": [224, 224, 3], "embedding": [512]},
    fit={"resize_mode": "shortest", "interpolation": "bicubic", "fill_color": "0"},
)
LARGE = replace(
    DEFAULT,
    tensors={"pixels": [378, 378, 3], "embedding": [1024]},
    fit={"resize_mode": "squash", "interpolation": "bilinear", "fill_color": "0"},
)
TEXT = replace(DEFAULT, tensors={"tokens": [64], "embedding": [1024]}, fit={})


@pytest.mark.parametrize("config_name", [None, *config_names(MODELS)])
def test_the_committed_configurations_fit_the_default_model(config_name):
    """Manifests of the default model do not change them, nor do missing ones."""
    for towers in (Towers(DEFAULT, replace(TEXT, tensors={"tokens": [77], "embedding": [512]})), Towers()):
        for root in (ENSEMBLE, TEXT_ENSEMBLE):
            for model in deployment(MODELS, config_name, root=root):
                assert not towers.apply_to(model.config), model.name


@pytest.mark.parametrize("config_name", [None, *config_names(MODELS)])
def test_every_field_gets_the_towers_dimensions(config_name):
    """Warm-ups, CUDA graphs and TensorRT's profile too."""
    for root, was, wanted in (
        (ENSEMBLE, ("224", "512"), ("378", "1024")),
        (TEXT_ENSEMBLE, ("77", "512"), ("64", "1024")),
    ):
        found = ""
        for model in deployment(MODELS, config_name, root=root):
            assert Towers(LARGE, TEXT).apply_to(model.config), model.name
            found += str(model.config)
        assert all(number in found for number in wanted)
        for number in was:
            assert f"dims: {number}\n" not in found and f"dim: {number}\n" not in found and f"x{number}" not in found


def test_preprocess_gets_the_resize_parameters_that_differ_from_its_own():
    config = read_config(MODELS, "preprocess")
    Towers(LARGE).apply_to(config)
    found = {key: value.string_value for key, value in config.parameters.items()}
    assert (found["resize_mode"], found["interpolation"]) == ("squash", "bilinear")
    assert "fill_color" not in found
    Towers(DEFAULT).apply_to(config)  # and back, as a swap does
    assert config.parameters["resize_mode"].string_value == "shortest"
