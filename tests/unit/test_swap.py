"""The steps of a swap, and how each failure is undone, on a fake server with the committed repository."""

from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clip_embed.server_info import CHECKPOINT, MODEL
from clip_tools.accuracy.sample import Sample
from clip_tools.errors import ToolError
from clip_tools.gpu import find_gpu
from clip_tools.paths import MODELS
from clip_tools.repository import deployment, read_config
from clip_tools.serving import manifests, provenance, swap_checks
from clip_tools.serving import swap_steps as steps_of_a_swap
from clip_tools.serving.model_control import GrpcModelControl, ServerFullError, reason_in
from clip_tools.serving.provenance import set_provenance
from clip_tools.serving.swap import swap
from clip_tools.serving.swap_steps import SwapOptions, becomes_idle, same_configuration, swap_steps
from clip_tools.serving.vector_check import WrongVectors


class FakeServer:
    """Behaves like Triton: an ensemble whose new configuration does not load is unloaded, and a model that does not
    reload keeps its old configuration. `fails` names the calls that fail."""

    def __init__(self, name: str = "onnx", *fails: str) -> None:
        models = deployment(MODELS, name)
        set_provenance(models)
        self.models = {model.name: model.config for model in models}
        self.fails, self.log, self.weights = set(fails), [], {}
        self.counts: list[int] = []
        self.batches: list[int] = []

    def configuration(self, model):
        if model not in self.models:
            raise ToolError(f"Request for unknown model: '{model}'")
        return self.models[model]

    def ready_models(self):
        return list(self.models)

    def load(self, model, config):
        self.log.append(f"load {model}")
        if f"load {model}" in self.fails:
            self.fails.discard(f"load {model}")  # the undo may load it
            if model == "clip_ensemble":
                self.models.pop(model, None)
            raise ToolError(f"{model}: no GPU")
        self.models[model] = config

    def unload(self, model):
        self.log.append(f"unload {model}")
        self.models.pop(model, None)
        if f"unload {model}" in self.fails:
            raise ToolError("the connection was lost")

    def forget_failures(self, models):
        """Only the real Triton has any: tests/e2e/test_swap_under_load.py."""

    def embed_pixels(self, model, pixels):
        self.batches.append(len(pixels))
        if f"embed {model}" in self.fails:
            return np.zeros((len(pixels), 512), np.float32)
        vector = np.zeros((len(pixels), 512), np.float32)
        vector[:, self.weights.get(model, 0)] = 1
        return vector

    def embed_image(self, image):
        self.log.append("ask clip_ensemble")
        if "embed clip_ensemble" in self.fails:
            self.fails.discard("embed clip_ensemble")
            return np.zeros((1, 512), np.float32)
        for step in self.configuration("clip_ensemble").ensemble_scheduling.step:
            self.configuration(step.model_name)
        return np.eye(1, 512, dtype=np.float32)

    def embed_text(self, text):
        self.log.append("ask clip_text_ensemble")
        return np.eye(1, 512, dtype=np.float32)

    def answered(self, model):
        return self.counts.pop(0) if self.counts else 7


def swapped(server, name: str, **options) -> list[str]:
    said = []
    swap(server, SwapOptions(name, settle_s=0.01, **options), said.append)
    return said


def test_the_new_engine_embeds_before_the_ensemble_uses_it_and_the_old_one_is_unloaded_last():
    server = FakeServer()
    said = swapped(server, "trt")
    assert server.log == ["load clip_trt", "load clip_ensemble", "ask clip_ensemble", "unload clip_onnx"]
    assert [line.split(" (")[0] for line in said] == [
        "1/5 clip_trt loaded",
        "2/5 clip_trt embeds",
        "3/5 clip_ensemble goes through clip_trt",
        "4/5 clip_ensemble embeds",
        "5/5 clip_onnx unloaded",
    ]
    assert sorted(server.models) == ["clip_ensemble", "clip_trt", "preprocess"]


def test_a_swap_there_and_back_restores_every_configuration():
    server = FakeServer()
    before = dict(server.models)
    swapped(server, "trt")
    swapped(server, "onnx")
    assert server.models == before


def test_a_model_of_the_same_name_is_reloaded_in_place_and_the_ensemble_stays():
    server = FakeServer()
    swapped(server, "cpu-bf16")
    assert server.log == ["load clip_onnx", "ask clip_ensemble"]
    assert server.models["clip_onnx"] == read_config(MODELS, "clip_onnx", "cpu-bf16")


def test_a_configuration_that_changes_only_preprocess_does_not_reload_the_engine():
    server = FakeServer()
    swapped(server, "fast")
    assert server.log == ["load preprocess", "load clip_ensemble", "ask clip_ensemble"]
    assert server.models["clip_ensemble"].parameters["clip_preprocess"].string_value == "fast"  # clients read it
    swapped(server, "onnx")
    assert server.models["preprocess"] == read_config(MODELS, "preprocess")


def test_preprocess_keeps_the_instance_count_that_it_started_with():
    """`swap` may not know the count: the server may be on another machine, or its user chose the count."""
    server = FakeServer()
    server.models["preprocess"].instance_group[0].count = 14
    assert swapped(server, "trt")[0].startswith("1/5 clip_trt loaded")
    swapped(server, "fast")
    assert server.models["preprocess"].parameters["mode"].string_value == "fast"
    assert server.models["preprocess"].instance_group[0].count == 14


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_an_engine_on_a_gpu_server_is_warmed_up_even_if_swap_runs_on_a_machine_without_a_gpu():
    server = FakeServer("trt")
    server.models["clip_trt"].instance_group[0].kind = 1  # KIND_GPU, as a server completes it
    swapped(server, "onnx")
    assert [one.batch_size for one in server.models["clip_onnx"].model_warmup] == [1, 2, 4, 8, 16, 32, 64]


@pytest.fixture
def with_texts(monkeypatch):
    """A server that embeds texts too, and a repository with their tower."""
    texts = deployment(MODELS, root="clip_text_ensemble")
    monkeypatch.setattr(
        steps_of_a_swap, "text_deployment", lambda _, name: deployment(MODELS, name, root="clip_text_ensemble")
    )
    server = FakeServer()
    server.models |= {model.name: model.config for model in texts}
    return server


def test_the_text_tower_is_reloaded_only_if_its_configuration_or_the_weights_change(with_texts):
    swapped(with_texts, "trt")
    swapped(with_texts, "onnx")
    assert not any("text" in line for line in with_texts.log)
    swapped(with_texts, "cpu-fp32")
    assert with_texts.log[-4:] == [
        "load clip_onnx",
        "load clip_text_onnx",
        "ask clip_text_ensemble",
        "ask clip_ensemble",
    ]
    with_texts.log.clear()
    swapped(with_texts, "onnx", allow_other_weights=True)
    assert {"load tokenize", "load clip_text_onnx"} <= set(with_texts.log)
    assert "tokenize" in with_texts.models


def test_towers_of_different_weights_are_refused_before_anything_changes(with_texts, monkeypatch):
    """Even with `allow_other_weights`: no text would be near any image."""

    def made(file):
        return SimpleNamespace(identity=("ViT-B-32", file.parents[1].name))

    monkeypatch.setattr(manifests, "manifest_of", made)
    with pytest.raises(
        ToolError, match="clip_trt is of ViT-B-32 clip_trt and clip_text_onnx of ViT-B-32 clip_text_onnx"
    ):
        swapped(with_texts, "trt", allow_other_weights=True)
    assert with_texts.log == []
    swapped(FakeServer(), "trt")  # it serves no texts


def test_a_model_is_not_reloaded_for_its_warm_ups():
    server = FakeServer()
    server.models["clip_onnx"].model_warmup.add(name="batch 1", batch_size=1)
    assert swapped(server, "onnx") == ["the server runs onnx already"]


@pytest.mark.parametrize(
    ("name", "wrong", "step"),
    [
        ("trt", "engine", "3 of 7 (clip_trt verified against open_clip)"),
        ("trt", "ensemble", "6 of 7 (clip_ensemble verified against open_clip)"),
        ("fast", "ensemble", "4 of 4 (clip_ensemble verified against open_clip)"),
    ],
)
def test_a_swap_is_undone_if_the_vectors_do_not_match_open_clip(monkeypatch, name, wrong, step):
    """First the engine alone, on exact pixels. Then the whole ensemble, even if only `preprocess` changed."""

    def check(engine, _embed, *, on_pixels=False):
        assert engine.config_name == name
        if wrong == ("engine" if on_pixels else "ensemble"):
            raise WrongVectors("worst cosine 0.5")
        return "right"

    monkeypatch.setattr(swap_checks, "check_vectors", check)
    server = FakeServer()
    before = dict(server.models)
    with pytest.raises(ToolError) as caught:
        swapped(server, name, check_vectors=True)
    assert f"step {step}: worst cosine 0.5; everything is as before" in str(caught.value)
    assert server.models == before


@pytest.mark.parametrize("words", ["Exceeds maximum queue size", "Request timeout expired"])
def test_tritons_messages_for_a_full_queue_raise_server_full_error(words):
    control = GrpcModelControl("grpc://localhost:1")
    with pytest.raises(ServerFullError, match=words), control._our_errors():
        raise InferenceServerException(words, status="StatusCode.UNAVAILABLE")


def test_a_full_server_is_asked_again(monkeypatch):
    """Servers are swapped under load."""
    server, refused = FakeServer(), ["full", "full"]
    embed_image = server.embed_image

    def embed_or_refuse(image):
        if refused:
            raise ServerFullError(refused.pop())
        return embed_image(image)

    monkeypatch.setattr(server, "embed_image", embed_or_refuse)
    assert "5/5 clip_onnx unloaded" in swapped(server, "trt")[-1]
    assert not refused


def test_the_sample_is_verified_one_image_at_a_time(monkeypatch):
    """An engine may not accept batches. The ensemble is verified in the same way."""
    random, seen = np.random.default_rng(0), []
    pixels = random.integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    sample = Sample(("m", "p"), (b"a", b"b", b"c"), pixels, np.zeros((3, 512), np.float32))
    monkeypatch.setattr(swap_checks, "check_vectors", lambda _, embed, **__: seen.append(embed(sample)) or "right")
    server = FakeServer()
    said = swapped(server, "trt", check_vectors=True)
    assert [found.shape for found in seen] == [(3, 512), (3, 512)]
    assert set(server.batches) == {1}
    assert "3/7 clip_trt verified against open_clip: right" in said[2]


def test_a_swap_to_the_running_configuration_does_nothing():
    server = FakeServer("cpu-bf16")
    assert swapped(server, "cpu-bf16") == ["the server runs cpu-bf16 already"]
    assert server.log == []


@pytest.mark.parametrize(
    ("fails", "step"),
    [
        ("load clip_trt", "1 of 5 (clip_trt loaded)"),
        ("embed clip_trt", "2 of 5 (clip_trt embeds)"),
        ("load clip_ensemble", "3 of 5 (clip_ensemble goes through clip_trt)"),
        ("embed clip_ensemble", "4 of 5 (clip_ensemble embeds)"),
        ("unload clip_onnx", "5 of 5 (clip_onnx unloaded)"),
    ],
)
def test_a_failure_at_any_step_is_undone_and_names_the_step(fails, step):
    server = FakeServer("onnx", fails)
    before = dict(server.models)
    with pytest.raises(ToolError) as caught:
        swapped(server, "trt")
    assert f"swap to trt failed at step {step}" in str(caught.value)
    assert str(caught.value).endswith("everything is as before")
    assert server.models == before


def test_an_in_place_change_that_does_not_embed_is_undone():
    server = FakeServer("onnx", "embed clip_ensemble")
    before = dict(server.models)
    with pytest.raises(ToolError, match="everything is as before"):
        swapped(server, "cpu-bf16")
    assert server.models == before


def test_a_failed_undo_is_reported_as_such():
    server = FakeServer("onnx", "embed clip_ensemble")
    load = server.load

    def load_once(model, config):
        if "ask clip_ensemble" in server.log:
            raise ToolError("the server has gone")
        load(model, config)

    server.load = load_once
    with pytest.raises(ToolError, match=r"could not be undone \(.*the server has gone.*\): restart the server"):
        swapped(server, "trt")
    assert "clip_trt" in server.models  # the ensemble uses it


def test_ctrl_c_during_a_swap_undoes_it():
    server = FakeServer()
    before = dict(server.models)

    def interrupted(_image):
        server.embed_image = lambda _: np.eye(1, 512, dtype=np.float32)
        raise KeyboardInterrupt

    server.embed_image = interrupted
    with pytest.raises(KeyboardInterrupt):
        swapped(server, "trt")
    assert server.models == before


def test_other_weights_are_refused_unless_allowed():
    server = FakeServer()
    server.weights["clip_trt"] = 3
    with pytest.raises(ToolError, match=r"clip_trt was built from other weights.*cosine 0\.00.*as before"):
        swapped(server, "trt")
    swapped(server, "trt", allow_other_weights=True)
    assert "clip_trt" in server.models


def test_a_model_that_another_ensemble_uses_stays_loaded():
    server = FakeServer()
    server.models["thumbnails"] = read_config(MODELS, "clip_ensemble")
    swapped(server, "trt")
    assert "clip_onnx" in server.models


def test_a_model_that_still_gets_requests_stays_loaded(monkeypatch):
    server = FakeServer()
    monkeypatch.setattr("clip_tools.serving.swap_steps.becomes_idle", lambda *_: False)
    assert "still gets requests" in swapped(server, "trt")[-1]
    assert "clip_onnx" in server.models


def test_a_model_is_idle_only_after_a_quiet_period():
    server = FakeServer()
    server.counts = [1, 2, 2, 3]
    assert becomes_idle(server, "clip_onnx", 0.02)
    assert server.counts == []
    server.counts = list(range(1000))
    assert not becomes_idle(server, "clip_onnx", 0.02, limit_s=0.05)


def test_an_unknown_configuration_name_changes_nothing():
    server = FakeServer()
    with pytest.raises(ToolError, match=r"'fp12'.*cpu-bf16"):
        swap_steps(server, SwapOptions("fp12"))
    assert server.log == []


def test_fields_that_triton_adds_to_a_configuration_are_no_difference():
    """Here those that Triton 24.10 adds to models/clip_onnx/config.pbtxt on a server without a GPU."""
    wanted = read_config(MODELS, "clip_onnx")
    present = type(wanted)()
    present.CopyFrom(wanted)
    present.name, present.platform, present.runtime = "clip_onnx", "onnxruntime_onnx", "model.py"
    present.version_policy.latest.num_versions = 1
    present.instance_group[0].name, present.instance_group[0].kind = "clip_onnx_0", 2
    present.default_model_filename = "model.onnx"
    present.dynamic_batching.preferred_batch_size.append(64)
    present.optimization.input_pinned_memory.enable = True
    present.optimization.output_pinned_memory.enable = True
    assert same_configuration(present, wanted)
    assert not same_configuration(present, read_config(MODELS, "clip_onnx", "cpu-bf16"))
    assert not same_configuration(present, read_config(MODELS, "clip_onnx", "ort-fp16"))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "load failed for model 'clip_trt': version 1 is at UNAVAILABLE state: Internal: TritonModelException: "
            "clip_trt: a plan needs a GPU\n\nAt:\n  model.py(33): initialize\n;\n",
            "clip_trt: a plan needs a GPU",
        ),
        (
            "load failed for model 'clip_trt': version 1 is at UNAVAILABLE state: Invalid argument: unable to find "
            "backend library for backend 'tensorrt';\n",
            "unable to find backend library for backend 'tensorrt'",
        ),
        ("Request for unknown model: 'x' is not found", "Request for unknown model: 'x' is not found"),
    ],
)
def test_the_reason_is_extracted_from_tritons_message(message, reason):
    assert reason_in(message) == reason


def test_a_url_of_another_protocol_is_a_usage_error():
    with pytest.raises(ToolError, match="expected grpc://HOST:PORT") as caught:
        GrpcModelControl("http://localhost:8000")
    assert caught.value.exit_code == 2


def test_files_of_other_weights_than_those_served_are_refused_before_anything_is_loaded(monkeypatch):
    """After an export beside a running server, loading any model would read the new file."""
    server = FakeServer("onnx")
    parameters = server.models["clip_ensemble"].parameters
    for name, value in ((MODEL, "ViT-B-16"), (CHECKPOINT, "random:1")):
        parameters[name].string_value = value
    monkeypatch.setattr(provenance, "_weight_parameters", lambda _: {MODEL: "ViT-B-32", CHECKPOINT: "random:0"})
    with pytest.raises(
        ToolError, match=r"expected the weights that are served, ViT-B-16, random:1.*ViT-B-32, random:0"
    ):
        swapped(server, "cpu-fp32")
    assert server.log == []
    swapped(server, "cpu-fp32", allow_other_weights=True)
