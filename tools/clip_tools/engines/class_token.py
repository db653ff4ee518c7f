"""The image tower with its last block computed for the class token alone, which is all that is read after it."""

import copy
from typing import Any


def with_short_last_block(visual: Any) -> Any:
    """A copy of open_clip's ViT whose last block has one query a picture; any other tower as it came.

    The pooling keeps the class token and drops the rest, so in the last block their queries, projection and MLP are
    work for nothing: ten twelfths of the block's products with weights. Keys and values are still those of all tokens,
    so the answer is the same.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if not _reads_class_token_alone(visual):
        return visual

    class LastBlock(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        """(N, tokens, width) -> (N, 1, width) by a block's own weights."""

        def __init__(self, block: Any) -> None:
            super().__init__()
            attention = block.attn
            weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
            # Split here: of torch's own attention the exporter writes a graph that splits its weights at every run.
            self.query = _linear(weight[:width], bias[:width])
            self.key_value = _linear(weight[width:], bias[width:])
            self.heads, self.out_proj = attention.num_heads, attention.out_proj
            self.ln_1, self.ls_1 = block.ln_1, block.ls_1
            self.ln_2, self.ls_2, self.mlp = block.ln_2, block.ls_2, block.mlp

        def forward(self, tokens: Any, attn_mask: None = None) -> Any:
            token = tokens[:, :1] + self.ls_1(self.attention(self.ln_1(tokens)))
            return token + self.ls_2(self.mlp(self.ln_2(token)))

        def attention(self, tokens: Any) -> Any:
            query = self.query(tokens[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            key_value = self.key_value(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = scaled_dot_product_attention(query, key_value[0], key_value[1])  # (N, heads, 1, width / heads)
            return self.out_proj(mixed.transpose(1, 2).flatten(2))

    short = copy.deepcopy(visual)  # the oracle's own stays whole: the export is compared with it
    blocks = short.transformer.resblocks
    blocks[-1] = LastBlock(blocks[-1])
    return short


def _reads_class_token_alone(visual: Any) -> bool:
    """Whether this is open_clip's plain ViT, pooled by its class token, its last block of the plain kind."""
    import torch
    from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer

    if type(visual) is not VisionTransformer or type(visual.transformer) is not Transformer:
        return False
    last = visual.transformer.resblocks[-1]
    return (
        visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and visual.transformer.batch_first
        and type(last) is ResidualAttentionBlock
        and type(last.attn) is torch.nn.MultiheadAttention
    )


def _linear(weight: Any, bias: Any) -> Any:
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
    return layer
