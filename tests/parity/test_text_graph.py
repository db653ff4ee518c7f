"""The ONNX graph of a plain text tower gives open_clip's embeddings and skips what follows the end token."""

from types import SimpleNamespace

import numpy as np
import pytest
from tests.conftest import Lazily

from clip_tools.digest import files_of
from clip_tools.export.export_onnx import check_drift
from clip_tools.export.export_text import write_text_graph
from clip_tools.export.external_data import LARGEST_BYTES
from clip_tools.export.text_graph import is_plain_text

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")
open_clip = Lazily("open_clip")
torch = Lazily("torch")

CONTEXT, WORDS = 12, 50  # the end of a text is the highest token


def small_tower(**changes) -> SimpleNamespace:
    """A model with a small text tower of open_clip. Noise moves every weight away from its default 0 or 1."""
    torch.manual_seed(0)
    if "act_layer" in changes:
        changes["act_layer"] = getattr(open_clip.transformer, changes["act_layer"])
    sizes = {"context_length": CONTEXT, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": 2, "output_dim": 24}
    tower = open_clip.transformer.TextTransformer(**(sizes | changes)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return SimpleNamespace(text=tower)


def texts() -> np.ndarray:
    """Tokens of every length in random order, with zeros after the end token. One row has two end tokens."""
    noise = np.random.default_rng(0)
    tokens = noise.integers(1, WORDS - 1, (24, CONTEXT))
    for row, length in zip(tokens, noise.permutation(np.arange(24) % (CONTEXT - 1) + 1), strict=True):
        row[length] = WORDS - 1
        row[length + 1 :] = 0
    tokens[3, [2, 5]] = WORDS - 1
    return tokens


@pytest.mark.parametrize("largest_bytes", [LARGEST_BYTES, 1 << 10], ids=["in one file", "in two"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"act_layer": "QuickGELU"}, {"ls_init_value": 0.5}, {"layers": 1}],
    ids=str,
)
def test_a_plain_text_tower_gives_open_clips_answer_at_every_length(changes, largest_bytes, tmp_path):
    model, tokens = small_tower(**changes), texts()
    assert is_plain_text(model)
    write_text_graph(model, tokens[:2], tmp_path / "text.onnx", largest_bytes=largest_bytes)
    assert len(files_of(tmp_path / "text.onnx")) == (1 if largest_bytes == LARGEST_BYTES else 2)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.text(torch.from_numpy(tokens)), dim=-1).numpy()
    check_drift(tmp_path / "text.onnx", "tokens", tokens, expected)
    graph = onnx.load(str(tmp_path / "text.onnx"))
    onnx.checker.check_model(graph, full_check=True)
    assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_tokens_after_the_end_token_are_not_computed(tmp_path):
    """Even a token outside the vocabulary is no error there."""
    model, tokens = small_tower(), texts()[:1]
    write_text_graph(model, texts()[:2], tmp_path / "text.onnx")
    end = int(tokens.argmax())
    assert end < CONTEXT - 1
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "text.onnx"), providers=["CPUExecutionProvider"])
    whole = session.run(None, {"tokens": tokens})[0]
    tokens[0, end + 1 :] = -10 * WORDS
    assert np.array_equal(session.run(None, {"tokens": tokens})[0], whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"no_causal_mask": True},
        {"embed_cls": True},
        {"pool_type": "last"},
        {"proj_bias": True},
        {"proj_type": "none"},
        {"scale_heads": True},
    ],
)
def test_another_text_tower_is_not_plain(changes):
    assert not is_plain_text(small_tower(**changes))
