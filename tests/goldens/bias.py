"""ALiBi as MPT and Falcon have it: after the division by √d in the one, inside it in the other (`regenerate.py`)."""

import math


def make():
    """All goldens, as a tree of lists and numbers."""
    return {"mpt": mpt(), "falcon": falcon()}


def mpt():
    """MPT's attention layer with an identity for its output projection; six heads, so not a power of two."""
    import torch
    from transformers import MptConfig
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

    torch.manual_seed(0)
    heads, head_dim, length = 6, 4, 9
    layer = MptAttention(MptConfig(d_model=heads * head_dim, n_heads=heads), layer_idx=0).eval()
    layer.Wqkv.weight.data.normal_(std=0.5)
    layer.out_proj.weight.data.copy_(torch.eye(heads * head_dim))
    hidden = torch.randn(1, length, heads * head_dim)
    query, key, value = (x.view(1, length, heads, head_dim) for x in layer.Wqkv(hidden).chunk(3, dim=2))
    hides = ~torch.ones(length, length, dtype=torch.bool).tril()
    out, weights = layer(hidden, build_mpt_alibi_tensor(heads, length), attention_mask=hides)
    return golden(query, key, value, out, weights)


def falcon():
    """Falcon's attention layer, four query heads on one key/value head, an identity for its output projection.

    Falcon adds the bias inside the division by √d, against the paper. It keeps slopes in bfloat16, which holds those of
    four heads and their first multiples exactly.
    """
    import torch
    from transformers import FalconConfig
    from transformers.models.falcon.modeling_falcon import FalconAttention, build_alibi_tensor

    torch.manual_seed(1)
    heads, head_dim, length = 4, 8, 9
    config = FalconConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, alibi=True, multi_query=True, bias=False,
        new_decoder_architecture=False, attention_dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    layer = FalconAttention(config, layer_idx=0).eval()
    layer.query_key_value.weight.data.normal_(std=0.5)
    layer.dense.weight.data.copy_(torch.eye(heads * head_dim))
    hidden = torch.randn(1, length, heads * head_dim)
    query, key, value = layer._split_heads(layer.query_key_value(hidden))
    alibi = build_alibi_tensor(torch.ones(1, length), heads, torch.float32)
    mask = torch.zeros(length, length).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    out, weights = layer(hidden, alibi, mask[None, None], output_attentions=True)
    return golden(query, key, value, out, weights)


def golden(query, key, value, out, weights):
    """Inputs [B, T, N, H], output as them, and entropy [B, N, T]."""
    import torch

    inputs = {name: x.tolist() for name, x in (("query", query), ("key", key), ("value", value))}
    return inputs | {"out": out.view(query.shape).tolist(), "entropy": torch.special.entr(weights).sum(-1).tolist()}
