"""The image tower of an open_clip ViT as an ONNX graph of few nodes, written from its weights.

torch.onnx.export gives 602 nodes for ViT-B-32, most of them shapes, slices and reshapes. On a GPU each node costs
microseconds to launch, and a convolution searches for its algorithm at every new batch size
(microsoft/onnxruntime#19838). This graph avoids both:

- patches are cut by Reshape and Transpose and embedded by one MatMul, with `(x / 255 - mean) / std` in its weights;
- the class token is a row of padding, to which the position embedding is added;
- query, key and value come from one product, and `1 / sqrt(head width)` and LayerScale are in the weights;
- the last block computes only the class token, because nothing later reads another. Keys and values are still those of
  all tokens, so the result is the same.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from clip_tools.export.external_data import DataFile

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    Array = npt.NDArray[Any]

# portable: only operators that every engine supports, including OpenVINO; all images' tokens are one list, so that a
# linear layer is one Gemm. gpu: attention is one node, for which CUDA and TensorRT have flash kernels, and a linear
# layer is MatMul and Add, which may have different types.
Form = Literal["portable", "gpu"]
# 23 is the first opset with Attention; ONNX Runtime 1.24 has no CUDA kernel for 24's (microsoft/onnxruntime#28025).
OPSETS: dict[Form, int] = {"portable": 20, "gpu": 23}
PATCH_EMBEDDING = "patch_embedding"  # the node
_QUICK_GELU = 1.702


def is_plain_vit(visual: Any) -> bool:
    """Whether this is open_clip's plain ViT, pooled by its class token, which this graph can represent."""
    from open_clip.transformer import VisionTransformer

    return (
        type(visual) is VisionTransformer
        and has_plain_blocks(visual.transformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and visual.proj is not None
    )


def has_plain_blocks(transformer: Any) -> bool:
    """Whether `GraphBuilder.block` can write each of its blocks."""
    import torch
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, Transformer

    return type(transformer) is Transformer and all(
        type(block) is ResidualAttentionBlock
        and type(block.attn) is torch.nn.MultiheadAttention
        and type(block.mlp.gelu) in (torch.nn.GELU, QuickGELU)
        for block in transformer.resblocks
    )


def vit_graph(
    visual: Any, mean: "tuple[float, ...]", std: "tuple[float, ...]", form: Form, data: DataFile | None = None
) -> "onnx.ModelProto":
    """The FP32 graph of a plain ViT: `pixels` (batch, H, W, 3) uint8 RGB -> `embedding` (batch, D) float32, L2 norm 1.

    With `data`, large weights are written to it.

    The gpu form multiplies pixels as `(x - 128) / 128`, which FP16 and BF16 represent exactly, so a lower precision
    rounds no pixel. With the reshaped B-32 this raised the worst FP16 cosine from 0.9957 to 0.9997.
    """
    import numpy as np

    builder = GraphBuilder(form, data)
    (patch_h, patch_w), (grid_h, grid_w) = visual.patch_size, visual.grid_size
    kernel = array_of(visual.conv1.weight).astype(np.float64)  # (width, 3, patch_h, patch_w)
    width, tokens = len(kernel), grid_h * grid_w + 1
    builder.tokens, builder.width = tokens, width
    patch = 3 * patch_h * patch_w

    x = builder.node("Cast", ["pixels"], "pixels_float", to=1)
    scale, centre = 255.0, 0.0
    if form == "gpu":
        x = builder.node("Sub", [x, builder.constant("pixel_centre", 128.0)], "pixels_centred")
        x = builder.node("Mul", [x, builder.constant("pixel_scale", 1 / 128)], "pixels_scaled")
        scale, centre = 255.0 / 128, 128.0
    x = builder.reshape(x, (-1, grid_h, patch_h, grid_w, patch_w, 3), "pixels_cut")
    x = builder.node("Transpose", [x], "pixels_by_patch", perm=[0, 1, 3, 2, 4, 5])
    x = builder.reshape(x, (-1, grid_h * grid_w, patch), "patches")
    means, stds = (np.array(value, np.float64)[:, None, None] for value in (mean, std))
    weight = (kernel / (scale * stds)).transpose(2, 3, 1, 0).reshape(patch, width)
    offset = (kernel * ((centre / 255 - means) / stds)).sum(axis=(1, 2, 3))
    position = array_of(visual.positional_embedding).astype(np.float64)
    position[0] += array_of(visual.class_embedding)
    position[1:] += offset
    x = builder.node("MatMul", [x, builder.constant("patch_weight", weight)], "patch_products", name=PATCH_EMBEDDING)
    x = builder.node("Pad", [x, builder.integers("one_token_before", (0, 1, 0, 0, 0, 0))], "patch_products_padded")
    x = builder.node("Add", [x, builder.constant("position", position)], "embedded")
    if form == "portable":
        x = builder.reshape(x, (-1, width), "tokens")
    if visual.ln_pre._parameters:  # an Identity has none
        x = builder.norm(x, visual.ln_pre, "ln_pre")
    blocks = visual.transformer.resblocks
    for index, block in enumerate(blocks):
        x = builder.block(x, block, f"block_{index}", last=index == len(blocks) - 1)
    x = builder.norm(x, visual.ln_post, "ln_post")
    return builder.embedding(x, visual.proj, "image_features", ("pixels", "UINT8", (*visual.image_size, 3)))


@dataclass
class GraphBuilder:
    """A graph under construction. Each method adds nodes and constants, and returns the name of their result.

    `tokens` is the number of tokens of one image or text, or the name of an int64 tensor (1,) that has it. `mask` and
    `pooled` name tensors of a text tower: `mask` (tokens, tokens) is added to the scores, and `pooled` (batch, 1) is
    the index of each text's token that becomes its embedding. Without them there is no mask, and the first token is
    pooled.
    """

    form: Form
    data: DataFile | None = None
    tokens: int | str = 0
    width: int = 0
    mask: str | None = None
    pooled: str | None = None
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)

    def node(self, operator: str, inputs: list[str], made: str, *, name: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [made], name=name or made, **attributes))
        return made

    def constant(self, name: str, value: "Array | float") -> str:
        """A float32 constant of that name."""
        import numpy as np
        from onnx import numpy_helper

        array = np.ascontiguousarray(np.asarray(value, np.float32))
        self.constants[name] = self.data.tensor(name, array) if self.data else numpy_helper.from_array(array, name)
        return name

    def integers(self, name: str, values: "tuple[int, ...] | int") -> str:
        """An int64 constant of that name."""
        import numpy as np
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def reshape(self, x: str, shape: "tuple[int, ...]", made: str) -> str:
        name = self.integers(f"shape_{'_'.join('n' if size < 0 else str(size) for size in shape)}", shape)
        return self.node("Reshape", [x, name], made)

    def by_item(self, x: str, shape: "tuple[int, ...]", made: str) -> str:
        """Reshaped to (batch, tokens, *shape)."""
        if isinstance(self.tokens, int):
            return self.reshape(x, (-1, self.tokens, *shape), made)
        whole = f"shape_of_tokens_{'_'.join(map(str, shape))}"
        if not any(whole in node.output for node in self.nodes):
            parts = [self.integers("any", (-1,)), self.tokens, self.integers(f"{whole}_end", shape)]
            self.node("Concat", parts, whole, axis=0)
        return self.node("Reshape", [x, whole], made)

    def norm(self, x: str, norm: Any, name: str) -> str:
        parameters = [self.constant(f"{name}_{key}", array_of(getattr(norm, key))) for key in ("weight", "bias")]
        return self.node("LayerNormalization", [x, *parameters], name, axis=-1, epsilon=norm.eps)

    def linear(self, x: str, weight: "Array", bias: "Array", name: str) -> str:
        """`x @ weight + bias`; weight is (in, out)."""
        factors = [x, self.constant(f"{name}_weight", weight)]
        offset = self.constant(f"{name}_bias", bias)
        if self.form == "portable":
            return self.node("Gemm", [*factors, offset], name)
        product = self.node("MatMul", factors, f"{name}_product", name=name)
        return self.node("Add", [product, offset], f"{name}_sum")

    def pooled_token(self, x: str, name: str) -> str:
        """(batch, width): the class token of each image, which is its first, or the `pooled` token of each text."""
        if self.form == "portable":
            x = self.by_item(x, (self.width,), f"{name}_by_item")
        if self.pooled:
            return self.node("GatherND", [x, self.pooled], name, batch_dims=1)
        return self.node("Gather", [x, self.integers("first", 0)], name, axis=1)

    def block(self, x: str, block: Any, name: str, *, last: bool) -> str:
        """A residual attention block; the last one returns the pooled token alone, (batch, width)."""
        attention, mlp = block.attn, block.mlp
        width, heads = attention.embed_dim, attention.num_heads
        weight, bias = array_of(attention.in_proj_weight).T.copy(), array_of(attention.in_proj_bias).copy()
        scale = 1 / math.sqrt(width // heads)
        weight[:, :width] *= scale
        bias[:width] *= scale
        normed = self.norm(x, block.ln_1, f"{name}_ln_1")
        if last:
            x = self.pooled_token(x, "pooled_token" if self.pooled else "class_token")
            pooled = self.norm(x, block.ln_1, f"{name}_ln_1_pooled")
            query = self.linear(pooled, weight[:, :width], bias[:width], f"{name}_query")
            both = self.linear(normed, weight[:, width:], bias[width:], f"{name}_key_value")
            mixed = self.attend_one(query, both, heads, name)
        else:
            both = self.linear(normed, weight, bias, f"{name}_qkv")
            mixed = self.attend(both, heads, name)
        weight, bias = _scaled(attention.out_proj, block.ls_1)
        x = self.node("Add", [x, self.linear(mixed, weight, bias, f"{name}_out")], f"{name}_attended")
        x_normed = self.norm(x, block.ln_2, f"{name}_ln_2")
        up, up_bias = array_of(mlp.c_fc.weight).T, array_of(mlp.c_fc.bias)
        down, down_bias = _scaled(mlp.c_proj, block.ls_2)
        hidden = self.linear(x_normed, up, up_bias, f"{name}_up")
        if type(mlp.gelu).__name__ == "QuickGELU":
            gate = self.node("Mul", [hidden, self.constant("quick_gelu", _QUICK_GELU)], f"{name}_gate_scaled")
            gate = self.node("Sigmoid", [gate], f"{name}_gate")
            hidden = self.node("Mul", [hidden, gate], f"{name}_active")
        else:
            hidden = self.node("Gelu", [hidden], f"{name}_active", approximate=mlp.gelu.approximate)
        return self.node("Add", [x, self.linear(hidden, down, down_bias, f"{name}_down")], f"{name}_done")

    def attend(self, both: str, heads: int, name: str) -> str:
        """Attention of all tokens to all tokens; `both` has query, key and value side by side."""
        if self.form == "gpu":
            return self.attention(self.split(both, 3, -1, name), heads, name)
        x = self.by_item(both, (3, heads, self.width // heads), f"{name}_by_head")
        x = self.node("Transpose", [x], f"{name}_heads", perm=[2, 0, 3, 1, 4])
        query, key, value = self.split(x, 3, 0, name)
        return self.multiply(query, key, value, self.mask, name)

    def attend_one(self, query: str, both: str, heads: int, name: str) -> str:
        """(batch, width): attention of the pooled token to all tokens; `both` has key and value side by side."""
        size = self.width // heads
        if self.form == "gpu":
            query = self.node("Unsqueeze", [query, self.integers("token_axis", (1,))], f"{name}_query_token")
            mixed = self.attention([query, *self.split(both, 2, -1, name)], heads, name)
            return self.node("Squeeze", [mixed, "token_axis"], f"{name}_mixed_token")
        query = self.reshape(query, (1, -1, heads, 1, size), f"{name}_query_heads")
        x = self.by_item(both, (2, heads, size), f"{name}_by_head")
        x = self.node("Transpose", [x], f"{name}_heads", perm=[2, 0, 3, 1, 4])
        key, value = self.split(x, 2, 0, name)
        mask = None
        if self.mask and self.pooled:  # the token's row: (batch, 1, tokens) -> (batch, 1, 1, tokens)
            row = self.node("Gather", [self.mask, self.pooled], "pooled_mask_row", axis=0)
            mask = self.node("Unsqueeze", [row, self.integers("second_axis", (1,))], "pooled_mask")
        return self.multiply(query, key, value, mask, name)

    def split(self, x: str, parts: int, axis: int, name: str) -> list[str]:
        from onnx import helper

        made = [f"{name}_{part}" for part in ("query_part", "key_part", "value_part")[-parts:]]
        self.nodes.append(helper.make_node("Split", [x], made, name=f"{name}_split", axis=axis, num_outputs=parts))
        return made

    def attention(self, parts: list[str], heads: int, name: str) -> str:
        sizes = {"q_num_heads": heads, "kv_num_heads": heads}
        return self.node("Attention", parts, f"{name}_mixed", name=f"{name}_attention", scale=1.0, **sizes)

    def multiply(self, query: str, key: str, value: str, mask: str | None, name: str) -> str:
        """Attention as matrix products, of (1, batch, heads, tokens, size): (batch x queries, width)."""
        key = self.node("Transpose", [key], f"{name}_key_turned", perm=[0, 1, 2, 4, 3])
        scores = self.node("MatMul", [query, key], f"{name}_scores")
        if mask:
            scores = self.node("Add", [scores, mask], f"{name}_scores_masked")
        shares = self.node("Softmax", [scores], f"{name}_shares", axis=-1)
        x = self.node("MatMul", [shares, value], f"{name}_mixed_heads")
        x = self.node("Transpose", [x], f"{name}_mixed_tokens", perm=[0, 1, 3, 2, 4])
        return self.reshape(x, (-1, self.width), f"{name}_mixed")

    def embedding(
        self, x: str, projection: Any, made: str, taken: "tuple[str, str, tuple[int, ...]]"
    ) -> "onnx.ModelProto":
        """The finished graph: (batch, width) projected to `made`, then to L2 norm 1. `taken` is the input's tensor."""
        from onnx import TensorProto, helper

        x = self.node("MatMul", [x, self.constant("projection_weight", array_of(projection))], made, name="projection")
        length = self.node("ReduceL2", [x, self.integers("last_axis", (-1,))], "length", keepdims=1)
        # torch's normalize has the same bound
        length = self.node("Max", [length, self.constant("least_length", 1e-12)], "length_bounded")
        self.node("Div", [x, length], "embedding")
        name, datatype, shape = taken
        graph = helper.make_graph(
            self.nodes,
            made.replace("features", "tower"),
            [helper.make_tensor_value_info(name, getattr(TensorProto, datatype), ["batch", *shape])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", projection.shape[1]])],
            list(self.constants.values()),
        )
        opset = helper.make_opsetid("", OPSETS[self.form])
        return helper.make_model(graph, opset_imports=[opset], ir_version=10, producer_name="clip-tools")


def array_of(parameter: Any) -> "Array":
    found: Array = parameter.detach().float().numpy()
    return found


def _scaled(linear: Any, scale: Any) -> "tuple[Array, Array]":
    """(in, out) weight and (out,) bias of a linear layer and the LayerScale after it, which may be an Identity."""
    weight, bias = array_of(linear.weight).T, array_of(linear.bias)
    if not hasattr(scale, "gamma"):
        return weight, bias
    gamma = array_of(scale.gamma)
    return weight * gamma, bias * gamma
