"""Relative attention of XLNet and DeBERTa-v2, and the latter's buckets (`regenerate.py`)."""

# (buckets, max distance); those of DeBERTa-v2 first.
BUCKETINGS = [(256, 512), (8, 20), (4, 6), (32, 128)]
DISTANCES = sorted({*range(-140, 141), *(sign * far for sign in (-1, 1) for far in (254, 255, 256, 300, 399, 510))})


def make():
    """All goldens, as a tree of lists and numbers."""
    return {
        "distances": DISTANCES,
        "deberta_bucket": [
            {"num_buckets": buckets, "max_distance": far, "buckets": deberta_bucket(buckets, far)}
            for buckets, far in BUCKETINGS
        ],
        "transformer_xl": {"causal": xlnet("uni", memory=4), "both_ways": xlnet("bi", memory=0)},
        "deberta": {
            "clipped": deberta(length=13, max_distance=4, buckets=0, is_causal=False),
            "clipped_causal": deberta(length=13, max_distance=4, buckets=0, is_causal=True),
            "buckets": deberta(length=24, max_distance=12, buckets=6, is_causal=False),
            "within": deberta(length=8, max_distance=8, buckets=0, is_causal=False),
        },
    }


def deberta_bucket(num_buckets, max_distance):
    """Theirs go on past max_distance, and are held within ± num_buckets where they become rows of a table."""
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    buckets = make_log_bucket_position(torch.tensor(DISTANCES), num_buckets, max_distance)
    return buckets.long().clamp(-num_buckets, num_buckets).tolist()


def xlnet(attn_type, memory):
    """XLNet's core of relative attention: five queries at the end of the keys, which include a memory."""
    import torch
    from transformers import XLNetConfig, XLNetModel

    torch.manual_seed(4)
    queries, heads, head_dim, width = 5, 2, 4, 8
    keys = queries + memory
    config = XLNetConfig(
        vocab_size=8, d_model=width, n_layer=1, n_head=heads, d_inner=8, attn_type=attn_type, dropout=0.0
    )
    model = XLNetModel(config).eval()
    layer = model.layer[0].rel_attn
    for parameter in (layer.r, layer.r_w_bias, layer.r_r_bias):
        parameter.data.normal_(std=0.7)
    query, key, value = (torch.randn(length, 1, heads, head_dim) for length in (queries, keys, keys))
    sinusoids = model.relative_positional_encoding(queries, keys, bsz=1)
    projected = torch.einsum("ibh,hnd->ibnd", sinusoids, layer.r)
    hidden = torch.ones(queries, keys).triu(1 + memory) if attn_type == "uni" else torch.zeros(queries, keys)
    out, weights = layer.rel_attn_core(
        query, key, value, projected, attn_mask=hidden[:, :, None, None], output_attentions=True
    )
    arrays = {"query": query, "key": key, "value": value, "out": out}
    parameters = {
        "content_bias": layer.r_w_bias,
        "position_bias": layer.r_r_bias,
        "position_kernel": layer.r.reshape(width, heads, head_dim),
    }
    return (
        {name: x.transpose(0, 1).tolist() for name, x in arrays.items()}
        | {name: x.tolist() for name, x in parameters.items()}
        | {"entropy": torch.special.entr(weights.permute(2, 3, 0, 1)).sum(-1).tolist()}
    )


def deberta(length, max_distance, buckets, is_causal):
    """DeBERTa-v2's attention, with 0 buckets for none.

    The biases of its projections are a last row of the kernels, and ones the last column of the table.
    """
    import torch
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    torch.manual_seed(5)
    heads, head_dim = 2, 4
    width = heads * head_dim
    config = DebertaV2Config(
        hidden_size=width, num_attention_heads=heads, relative_attention=True, pos_att_type=["c2p", "p2c"],
        max_relative_positions=max_distance, position_buckets=buckets or -1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = DisentangledSelfAttention(config).eval()
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.5)
    hidden, relative = torch.randn(1, length, width), torch.randn(2 * (buckets or max_distance), width)

    def to_heads(x):
        return x.reshape(*x.shape[:-1], heads, head_dim)

    def kernel(linear):
        return to_heads(torch.cat([linear.weight.T, linear.bias[None]]))

    may = torch.ones(1, 1, length, length, dtype=torch.bool)
    out, weights = layer(hidden, may.tril() if is_causal else may, output_attentions=True, rel_embeddings=relative)
    return {
        "max_distance": max_distance,
        "buckets": buckets,
        "is_causal": is_causal,
        **{name: to_heads(getattr(layer, f"{name}_proj")(hidden)).tolist() for name in ("query", "key", "value")},
        "relative": torch.cat([relative, torch.ones(len(relative), 1)], dim=1).tolist(),
        "key_kernel": kernel(layer.pos_key_proj).tolist(),
        "query_kernel": kernel(layer.pos_query_proj).tolist(),
        "out": to_heads(out).tolist(),
        "entropy": torch.special.entr(weights).sum(-1).tolist(),
    }
