"""`clip-tools export-onnx --text`: exports an open_clip model's text tower for `tokenize` and `clip_text_onnx`."""

import tempfile
from pathlib import Path
from typing import Any

from clip_tools.accuracy.sample import PHOTOGRAPHS, Sample
from clip_tools.accuracy.texts import texts
from clip_tools.export.export_onnx import check_drift, make_manifest, tensors_of, trace, write
from clip_tools.export.external_data import LARGEST_BYTES, is_large
from clip_tools.export.manifest import Manifest, put_in_place
from clip_tools.export.text_graph import is_plain_text, text_graph, text_tower
from clip_tools.oracle import Oracle, Weights, load_oracle, load_tokenizer
from clip_tools.paths import MODELS

TEXT_MODEL_PATH = MODELS / "clip_text_onnx" / "1" / "model.onnx"
MERGES = "merges.txt"


def merges_path(model_path: Path) -> Path:
    """The path of a text tower's byte-pair merges: in `tokenize` of its repository, or beside a model without one."""
    folder = model_path.absolute().parent
    if folder.parent.name == "clip_text_onnx":
        return folder.parent.parent / "tokenize" / "1" / MERGES
    return folder / MERGES


def export_text(weights: Weights, output: Path = TEXT_MODEL_PATH, *, oracle: Oracle | None = None) -> Manifest:
    """Export, compare with PyTorch, then put model, merges, manifest and sample in place. Raises ToolError on drift.

    The graph: `tokens` (batch, context) int64 -> `embedding` (batch, D) float32 with L2 norm 1. No file is replaced
    until the comparison has passed.
    """
    tokenizer = load_tokenizer(weights.model)
    oracle = oracle or load_oracle(weights)
    some = texts()[::3]
    tokens = tokenizer(some).numpy()
    expected = oracle.embed_tokens(tokens)
    merges = merges_path(output)
    for place in (output.parent, merges.parent):
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        draft = Path(folder) / output.name
        write_text_graph(oracle.model, tokens[:2], draft)
        worst_cosine, max_abs_difference = check_drift(draft, "tokens", tokens, expected)
        manifest = make_manifest(draft, weights, "fp32", worst_cosine, max_abs_difference, tensors=tensors_of(draft))
        (draft_merges := Path(folder) / MERGES).write_text(merges_text(tokenizer), "utf-8")
        draft_merges.replace(merges)
        put_in_place(draft, manifest, output)
    kept = slice(None, None, max(1, len(some) // PHOTOGRAPHS))
    files = tuple(text.encode() for text in some[kept])
    Sample(weights.identity, files, tokens[kept], expected[kept]).write(output)
    return manifest


def write_text_graph(model: Any, tokens: Any, path: Path, *, largest_bytes: int = LARGEST_BYTES) -> None:
    """Write the FP32 graph of the text tower: `text_graph` for a plain one, else by torch.onnx.export."""
    import torch

    tower = text_tower(model)  # which may be the whole model
    own = (value for name, value in tower.named_parameters() if not name.startswith("visual."))
    large = is_large(own, largest_bytes)
    if is_plain_text(model):
        write(lambda data: text_graph(model, data), path, large=large)
        return

    class TokensToEmbedding(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            embedding: torch.Tensor = self.model.encode_text(tokens, normalize=True)
            return embedding

    trace(TokensToEmbedding().eval(), torch.as_tensor(tokens), "tokens", path, large=large)


def merges_text(tokenizer: Any) -> str:
    """The merges of open_clip's byte-pair tokenizer, one per line, in the order in which they apply."""
    ranks: dict[tuple[str, str], int] = tokenizer.bpe_ranks
    return "".join(f"{first} {second}\n" for first, second in sorted(ranks, key=ranks.__getitem__))
