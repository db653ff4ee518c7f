"""The text tower of an open_clip model as an ONNX graph of few nodes, from the blocks of `vit_graph`.

The mask is causal and the embedding is made from the end-of-text token alone. Tokens after the last end in a batch
change nothing, so the graph cuts them off: a text of four words costs a tenth of one that fills the context.
"""

from typing import TYPE_CHECKING, Any

from clip_tools.export.external_data import DataFile
from clip_tools.export.vit_graph import GraphBuilder, array_of, has_plain_blocks

if TYPE_CHECKING:
    import onnx


def is_plain_text(model: Any) -> bool:
    """Whether the text tower is open_clip's plain causal transformer, pooled at the highest token."""
    import torch

    tower = text_tower(model)
    mask = getattr(tower, "attn_mask", None)
    return (
        has_plain_blocks(getattr(tower, "transformer", None))
        and getattr(tower, "text_pool_type", getattr(tower, "pool_type", None)) == "argmax"
        and getattr(tower, "cls_emb", None) is None
        and not getattr(tower, "output_tokens", False)
        and not getattr(tower, "use_pad_mask", False)
        and isinstance(tower.text_projection, torch.nn.Parameter)
        and mask is not None
        and torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))
    )


def text_tower(model: Any) -> Any:
    """The text tower of an open_clip model: its attribute `text`, or the model itself."""
    return getattr(model, "text", model)


def text_graph(model: Any, data: DataFile | None = None) -> "onnx.ModelProto":
    """The FP32 graph of a plain tower: `tokens` (batch, context) int64 -> `embedding` (batch, D) float32, L2 norm 1."""
    tower, builder = text_tower(model), GraphBuilder("portable", data)
    context, builder.width = tower.positional_embedding.shape
    end = builder.node("ArgMax", ["tokens"], "end", axis=1, keepdims=1)
    last = builder.node("ReduceMax", [end, builder.integers("first_axis", (0,))], "last_end", keepdims=0)
    length = builder.node("Add", [last, builder.integers("one", (1,))], "tokens_kept")
    begin = builder.integers("begin", (0,))
    x = builder.node("Slice", ["tokens", begin, length, builder.integers("second_axis", (1,))], "tokens_cut")
    x = builder.node(
        "Gather", [builder.constant("token_embedding", array_of(tower.token_embedding.weight)), x], "token_vectors"
    )
    position = builder.constant("position_embedding", array_of(tower.positional_embedding))
    position = builder.node("Slice", [position, begin, length, "first_axis"], "position")
    x = builder.node("Add", [x, position], "embedded")
    mask = builder.constant("mask", array_of(tower.attn_mask))
    mask = builder.node("Slice", [mask, begin, length, "first_axis"], "mask_rows")
    builder.mask = builder.node("Slice", [mask, begin, length, "second_axis"], "mask_cut")
    builder.tokens, builder.pooled = length, end
    x = builder.reshape(x, (-1, builder.width), "vectors")
    blocks = tower.transformer.resblocks
    for index, block in enumerate(blocks):
        x = builder.block(x, block, f"block_{index}", last=index == len(blocks) - 1)
    x = builder.norm(x, tower.ln_final, "ln_final")
    return builder.embedding(x, tower.text_projection, "text_features", ("tokens", "INT64", (context,)))
