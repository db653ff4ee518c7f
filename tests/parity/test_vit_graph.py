"""The ONNX graph of a plain ViT gives open_clip's embeddings in both forms, with few nodes and no convolution."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.conftest import Lazily

from clip_tools.accuracy.gates import cosines
from clip_tools.digest import data_path
from clip_tools.export.export_onnx import compare, write_graph
from clip_tools.export.external_data import load_graph, save_graph
from clip_tools.export.mix import LayeredGraph
from clip_tools.export.onnx_runner import run_onnx
from clip_tools.export.precision import count_matrices, emulate_in_fp32, lower
from clip_tools.export.tune_precision import embed
from clip_tools.export.vit_graph import OPSETS, is_plain_vit
from clip_tools.oracle import Oracle
from clip_tools.quantization.calibration import calibrate
from clip_tools.quantization.quantize import linear_layers, prepare
from clip_tools.quantization.rotation import ROTATION, rotate

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")
open_clip = Lazily("open_clip")
torch = Lazily("torch")

WIDTH = 64
LAYERS = {
    "QuickGELU": lambda: open_clip.transformer.QuickGELU(),  # noqa: PLW0108  not imported yet
    "GELU by tanh": lambda: torch.nn.GELU(approximate="tanh"),
}
MLP_WIDTH = 4 * WIDTH
BLOCK = ("attention", "mlp up", "mlp down")


def small_tower(**changes) -> "torch.nn.Module":
    """A small ViT of open_clip: two blocks, 49 patches and the class token. Noise moves weights away from 0 and 1."""
    torch.manual_seed(0)
    if "act_layer" in changes:
        changes["act_layer"] = LAYERS[changes["act_layer"]]
    sizes = {"image_size": 224, "patch_size": 32, "width": WIDTH, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
    tower = open_clip.transformer.VisionTransformer(**(sizes | changes), output_dim=512).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return tower


def oracle_of(tower: "torch.nn.Module") -> Oracle:
    def encode_image(images, normalize):
        assert normalize
        return torch.nn.functional.normalize(tower(images), dim=-1)

    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(224, is_train=False, mean=mean, std=std)
    return Oracle(SimpleNamespace(visual=tower, encode_image=encode_image), transform, mean, std)


def exported(tower: "torch.nn.Module", folder: Path, form: str = "portable") -> "onnx.ModelProto":
    """The tower's graph, which is compared with open_clip as in every export."""
    path, file = folder / "model.onnx", io.BytesIO()
    Image.fromarray(coarse_noise(1)[0]).save(file, "PNG")
    oracle = oracle_of(tower)
    write_graph(oracle, path, form)
    compare(oracle, path, [file.getvalue()])
    return onnx.load(str(path))


def coarse_noise(count: int) -> np.ndarray:
    return np.kron(np.random.default_rng(0).integers(0, 256, (count, 7, 7, 3)), np.ones((1, 32, 32, 1))).astype(
        np.uint8
    )


def tokens_of_each_mlp(model: "onnx.ModelProto") -> list[int]:
    """The number of tokens of one image that each block's first MLP product computes, in order."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    made = [shapes[node.output[0]] for node in model.graph.node if node.op_type == "MatMul"]
    return [shape[1] if len(shape) == 3 else 1 for shape in made if shape[-1] == MLP_WIDTH]


FORMS = list(OPSETS)


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> "onnx.ModelProto":
    return exported(small_tower(), tmp_path_factory.mktemp("portable"))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory) -> "onnx.ModelProto":
    return exported(small_tower(), tmp_path_factory.mktemp("gpu"), "gpu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {"final_ln_after_pool": True},
        {"ls_init_value": 0.5},
        {"act_layer": "QuickGELU"},
        {"act_layer": "GELU by tanh"},
        {"no_ln_pre": True},
        {"layers": 1},
        {"patch_size": 16},
    ],
    ids=str,
)
def test_every_plain_vit_gives_open_clips_answer(changes, form, tmp_path):
    """`exported` compares it with PyTorch at several batch sizes, and fails if they differ."""
    tower = small_tower(**changes)
    assert is_plain_vit(tower)
    graph = exported(tower, tmp_path, form)
    assert "Conv" not in {node.op_type for node in graph.graph.node}
    onnx.checker.check_model(graph, full_check=True)


def test_the_exported_model_has_no_convolution_and_no_shape_computation(onnx_model, gpu_model, weights):
    """CUDA would search for a convolution algorithm at each new batch size."""
    for path, most in ((onnx_model, 260), (gpu_model, 230)):
        graph = onnx.load(str(path)).graph
        assert len(graph.node) <= most
        assert not {"Conv", "Shape", "Slice", "Expand", "Concat"} & {node.op_type for node in graph.node}
    operators = [node.op_type for node in onnx.load(str(gpu_model)).graph.node]
    assert operators.count("Attention") == 12
    assert "Attention" not in [node.op_type for node in onnx.load(str(onnx_model)).graph.node]  # OpenVINO lacks it


def test_the_last_block_computes_one_token(gpu):
    assert tokens_of_each_mlp(gpu) == [50, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_type": "avg"},
        {"attentional_pool": True, "attn_pooler_heads": 2},
        {"output_tokens": True},
        {"scale_heads": True},
    ],
)
def test_another_image_tower_is_not_plain(changes):
    assert not is_plain_vit(small_tower(**changes))


@pytest.mark.parametrize(
    ("changes", "form"),
    [({}, "portable"), ({}, "gpu"), ({"pool_type": "avg"}, "portable")],
    ids=["plain", "gpu", "traced"],
)
def test_a_tower_over_the_limit_has_its_weights_in_a_second_file(changes, form, tmp_path):
    """The embeddings are the same as with one file, also in FP16."""
    tower = small_tower(**changes)
    whole = exported(tower, tmp_path, form)
    (tmp_path / "apart").mkdir()
    path = tmp_path / "apart" / "model.onnx"
    write_graph(oracle_of(tower), path, form, largest_bytes=1 << 10)
    assert 100_000 < data_path(path).stat().st_size < (tmp_path / "model.onnx").stat().st_size
    apart, pixels = load_graph(path), coarse_noise(3)
    assert run_onnx(path, pixels).embeddings.tobytes() == run_onnx(whole, pixels).embeddings.tobytes()
    for name, graph in (("whole", whole), ("apart", apart)):
        save_graph(lower(graph, "fp16"), tmp_path / f"{name}.onnx", {"whole": 1 << 30, "apart": 1 << 10}[name])
    assert data_path(tmp_path / "apart.onnx").is_file() and not data_path(tmp_path / "whole.onnx").exists()
    onnx.checker.check_model(str(tmp_path / "apart.onnx"), full_check=True)
    got = [run_onnx(tmp_path / f"{name}.onnx", pixels).embeddings.tobytes() for name in ("whole", "apart")]
    assert got[0] == got[1]


def test_a_tower_that_is_not_plain_is_exported_by_torch_with_every_token(tmp_path):
    graph = exported(small_tower(pool_type="avg"), tmp_path)
    assert tokens_of_each_mlp(graph) == [50, 50]
    assert "Conv" in {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize(("half", "off"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_attention_in_half_precision_is_emulated_by_two_products(gpu, half, off):
    """Its softmax weights are rounded too. The result is close to the FP32 graph's, but not equal."""
    lowered = lower(gpu, half)
    assert count_matrices(lowered) == {half: 2 * (4 + 2) + 1 + 2}
    assert "Attention" not in {node.op_type for node in emulate_in_fp32(lowered).graph.node}
    pixels = coarse_noise(4)
    difference = np.abs(run_onnx(lowered, pixels).embeddings - run_onnx(gpu, pixels).embeddings).max()
    assert 1e-6 < difference < off


def test_biases_are_added_to_the_residual_stream_in_fp32(gpu):
    """Biases of query, key, value and the MLP's first layer are added in FP16."""
    lowered = onnx.shape_inference.infer_shapes(lower(gpu, "fp16"))
    types = {value.name: value.type.tensor_type.elem_type for value in lowered.graph.value_info}
    for node in lowered.graph.node:
        if node.op_type == "Add" and node.name.endswith("_sum"):
            low = node.name.endswith(("_qkv_sum", "_query_sum", "_key_value_sum", "_up_sum"))
            assert types[node.output[0]] == (onnx.TensorProto.FLOAT16 if low else onnx.TensorProto.FLOAT), node.name


def test_attention_with_a_separate_query_is_one_layer(portable, tmp_path):
    """OpenVINO rejects a BF16 part that ends inside an attention. Only the residual stream passes between blocks."""
    layered = LayeredGraph(portable, tmp_path)
    blocks = [f"block {block}, {part}" for block in (0, 1) for part in BLOCK]
    assert [layer.name for layer in layered.layers] == ["patches", *blocks, "projection"]
    last_block = layered.single_layers()[4:7]
    assert [len(part.graph.input) for part in last_block] == [1, 1, 2]  # mlp down takes the stream too


@pytest.mark.usefixtures("bf16")
def test_each_layer_can_run_in_bf16(portable, tmp_path):
    layered, pixels = LayeredGraph(portable, tmp_path), coarse_noise(4)
    plain = embed(layered.open(["fp32"] * 8), pixels)
    for lowered in (range(0, 8, 2), range(1, 8, 2)):
        mixed = embed(layered.open(["bf16" if index in lowered else "fp32" for index in range(8)]), pixels)
        assert cosines(mixed, plain).min() > 0.99 and np.abs(mixed - plain).max() > 1e-6


def test_the_rotation_passes_through_the_selection_of_the_class_token(gpu):
    """The class token is selected before the last block's additions."""
    pixels = coarse_noise(6)
    turned = rotate(gpu)
    assert ROTATION in {node.name for node in turned.graph.node}
    before, after = run_onnx(gpu, pixels).embeddings, run_onnx(turned, pixels).embeddings
    assert np.abs(before - after).max() < 1e-5  # FP32 in another order


def test_int8_leaves_out_layers_that_see_only_the_class_token(gpu, tmp_path):
    """In the last block, all but keys and values have one row per image: too few to calibrate with, no work to save."""
    prepared = prepare(gpu, "int8")
    layers = calibrate(prepared, coarse_noise(6), coarse_noise(2), "int8", folder=tmp_path).layers
    left_out = [node.name for node in linear_layers(prepared) if node.name not in layers]
    assert left_out == ["block_1_query", "block_1_out", "block_1_up", "block_1_down"]
    assert len(layers) == 4 + 1
