"""The exported last block computes the class token alone, and the answer is still open_clip's own."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clip_tools.engines.calibration import calibrate
from clip_tools.engines.class_token import with_short_last_block
from clip_tools.engines.export_onnx import compare, write_graph
from clip_tools.engines.gates import cosines
from clip_tools.engines.mix import Engine
from clip_tools.engines.onnx_runner import run_onnx
from clip_tools.engines.precision import fold_normalisation, split_gemm
from clip_tools.engines.quantize import linear_layers, prepare
from clip_tools.engines.rotation import ROTATION, rotate
from clip_tools.engines.tune_precision import embed
from clip_tools.oracle import Oracle

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")
open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'clip-embed[export]'")
torch = pytest.importorskip("torch")

WIDTH = 64
MLP_WIDTH = 4 * WIDTH
BLOCK = ("attention", "mlp up", "mlp down")


def small_tower(**changes) -> "torch.nn.Module":
    """open_clip's ViT in small, two blocks over 49 patches and the class token; no weight is 0 or 1 by default."""
    torch.manual_seed(0)
    sizes = {"image_size": 224, "patch_size": 32, "width": WIDTH, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
    tower = open_clip.transformer.VisionTransformer(**sizes, output_dim=512, **changes).eval()
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


def exported(tower: "torch.nn.Module", folder: Path) -> "onnx.ModelProto":
    """The tower's graph, held to open_clip's own answer as every export is."""
    path, file = folder / "model.onnx", io.BytesIO()
    Image.fromarray(coarse_noise(1)[0]).save(file, "PNG")
    oracle = oracle_of(tower)
    write_graph(oracle, path)
    compare(oracle, path, [file.getvalue()])
    return onnx.load(str(path))


def coarse_noise(count: int) -> np.ndarray:
    return np.kron(np.random.default_rng(0).integers(0, 256, (count, 7, 7, 3)), np.ones((1, 32, 32, 1))).astype(
        np.uint8
    )


def tokens_of_each_mlp(model: "onnx.ModelProto") -> list[int]:
    """How many tokens of a picture each block's first MLP product has, in order."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    made = [shapes[node.output[0]] for node in model.graph.node if node.op_type == "MatMul"]
    return [shape[1] for shape in made if len(shape) == 3 and shape[2] == MLP_WIDTH]


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> "onnx.ModelProto":
    return exported(small_tower(), tmp_path_factory.mktemp("short"))


@pytest.mark.parametrize("final_ln_after_pool", [False, True])
@pytest.mark.parametrize("ls_init_value", [None, 0.5])
def test_one_query_gives_what_all_of_them_give(final_ln_after_pool, ls_init_value):
    """And the tower that was given stays whole: it is what the export is compared with."""
    tower = small_tower(final_ln_after_pool=final_ln_after_pool, ls_init_value=ls_init_value)
    images = torch.randn(3, 3, 224, 224)
    with torch.inference_mode():
        expected = tower(images)
        got = with_short_last_block(tower)(images)
        after_all_blocks = tower.transformer(tower._embeds(images))
    assert expected.abs().max() > 1
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()  # FP32 in another order
    assert after_all_blocks.shape == (3, 50, WIDTH)


def test_the_graph_multiplies_one_token_in_the_last_block(short):
    assert tokens_of_each_mlp(short) == [50, 1]
    assert not [node for node in short.graph.node if node.op_type == "Split"]  # of weights, at every run


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_type": "avg"},
        {"attentional_pool": True, "attn_pooler_heads": 2},
        {"output_tokens": True},
        {"scale_heads": True},
    ],
)
def test_a_tower_that_reads_more_or_is_built_otherwise_is_left_as_it_is(changes):
    tower = small_tower(**changes)
    assert with_short_last_block(tower) is tower


def test_a_tower_with_average_pooling_is_exported_with_every_token(tmp_path):
    assert tokens_of_each_mlp(exported(small_tower(pool_type="avg"), tmp_path)) == [50, 50]


def test_attention_with_a_query_of_its_own_is_one_layer_and_each_layer_may_be_bf16(short, tmp_path):
    """OpenVINO refuses in BF16 what ends inside an attention; what passes between two blocks is the stream alone."""
    engine, pixels = Engine(short, tmp_path), coarse_noise(4)
    blocks = [f"block {block}, {part}" for block in (0, 1) for part in BLOCK]
    assert [layer.name for layer in engine.layers] == ["patches", *blocks, "projection"]
    last_block = engine.apart()[4:7]
    assert [len(part.graph.input) for part in last_block] == [1, 1, 2]  # the MLP's middle goes beside the stream
    plain = embed(engine.open(["fp32"] * 8), pixels)
    for lowered in (range(0, 8, 2), range(1, 8, 2)):
        mixed = embed(engine.open(["bf16" if index in lowered else "fp32" for index in range(8)]), pixels)
        assert cosines(mixed, plain).min() > 0.99 and np.abs(mixed - plain).max() > 1e-6


def test_the_stream_is_turned_through_the_class_tokens_slice(short, tmp_path):
    """Before the last block's sums and, where the last norm comes behind the pooling, before that."""
    pixels = coarse_noise(6)
    for graph in (short, exported(small_tower(final_ln_after_pool=True), tmp_path)):
        prepared = split_gemm(fold_normalisation(graph))
        turned = rotate(prepared)
        assert ROTATION in {node.name for node in turned.graph.node}
        before, after = run_onnx(prepared, pixels).embeddings, run_onnx(turned, pixels).embeddings
        assert np.abs(before - after).max() < 1e-5  # FP32 in another order


def test_eight_bits_leave_out_what_sees_the_class_token_alone(short, tmp_path):
    """Of the last block all but its keys and values: there is one row an image to fit to, and no work to save."""
    prepared = prepare(short, "int8")
    layers = calibrate(prepared, coarse_noise(6), coarse_noise(2), "int8", folder=tmp_path).layers
    nodes = [node.name for node in linear_layers(prepared)]
    assert len(nodes) == 4 + 5
    assert [name in layers for name in nodes] == [True] * 4 + [False, True, False, False, False]
