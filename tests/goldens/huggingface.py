"""Rotations, biases, buckets, sinusoids and attention of Llama, GPT-J, GPT-NeoX, Bloom and T5 (`regenerate.py`)."""

import math

# Small positions: float32 angles are good to position · 2⁻²⁴ rad, and the goldens are to hold at 1e-5.
POSITIONS = [0, 1, 2, 5, 17, 63]
HEAD_COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 20, 24, 25, 32, 40, 48, 71, 112]
# (bidirectional, buckets, max distance); T5's own first.
BUCKETINGS = [(False, 32, 128), (True, 32, 128), (False, 16, 40), (True, 64, 1000), (False, 8, 20)]
# Every relative position near, then some far on both sides.
RELATIVE = sorted({*range(-140, 141), *(sign * far for sign in (-1, 1) for far in (200, 999, 1000, 1001, 65_537))})


def make():
    """All goldens, as a tree of lists and numbers."""
    return {
        "positions": POSITIONS,
        "rope": rope(),
        "alibi_slopes": alibi_slopes(),
        "relative": RELATIVE,
        "t5_bucket": t5_bucket(),
        "sinusoidal": sinusoidal(),
        "attention": {"nope_grouped": llama_attention(), "alibi": bloom_attention(), **t5_attention()},
    }


def rope():
    """The same array turned by Llama (halves), GPT-J (interleaved, 4 of 16 features) and GPT-NeoX (halves, 4 of 16)."""
    import torch
    from transformers import GPTNeoXConfig, LlamaConfig
    from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
    from transformers.models.gptj import modeling_gptj as gptj
    from transformers.models.llama import modeling_llama as llama

    torch.manual_seed(0)
    x = torch.randn(1, len(POSITIONS), 2, 16)  # [B, T, N, H]; Llama and GPT-NeoX want heads before time.
    positions = torch.tensor([POSITIONS])

    cos, sin = llama.LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=2))(x, positions)
    full = llama.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0].transpose(1, 2)

    sines, cosines = gptj.create_sinusoidal_positions(max(POSITIONS) + 1, 4)[positions].chunk(2, dim=-1)
    turned = gptj.apply_rotary_pos_emb(x[..., :4], sines, cosines)
    interleaved = torch.cat([turned, x[..., 4:]], dim=-1)

    parameters = {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.25}
    config = GPTNeoXConfig(hidden_size=32, num_attention_heads=2, rope_parameters=parameters)
    cos, sin = gpt_neox.GPTNeoXRotaryEmbedding(config)(x, positions)
    partial = gpt_neox.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0].transpose(1, 2)
    return {
        "x": x.tolist(),
        "llama": {"base": 10_000.0, "rotary_dim": 16, "interleaved": False, "out": full.tolist()},
        "gptj": {"base": 10_000.0, "rotary_dim": 4, "interleaved": True, "out": interleaved.tolist()},
        "gpt_neox": {"base": 500_000.0, "rotary_dim": 4, "interleaved": False, "out": partial.tolist()},
    }


def alibi_slopes():
    """Per head count, from BLOOM; MPT and Falcon are checked to agree."""
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor as build_falcon
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    slopes = {}
    for heads in HEAD_COUNTS:
        # slope · key position: its value at position 1 is the slope. MPT counts back from the last key.
        slope = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(-build_mpt_alibi_tensor(heads, 2)[:, 0, 0], slope)
        falcon = build_falcon(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(falcon, slope, rtol=2**-8, atol=0)  # Falcon keeps its slopes in bfloat16.
        slopes[str(heads)] = slope.tolist()
    return slopes


def t5_bucket():
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.tensor(RELATIVE)
    return [
        {
            "bidirectional": bidirectional,
            "num_buckets": num_buckets,
            "max_distance": max_distance,
            "buckets": T5Attention._relative_position_bucket(
                relative, bidirectional, num_buckets, max_distance
            ).tolist(),
        }
        for bidirectional, num_buckets, max_distance in BUCKETINGS
    ]


def sinusoidal():
    """SpeechT5 alternates sine and cosine; Marian puts all sines first."""
    import torch
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5ScaledPositionalEncoding

    length, features = max(POSITIONS) + 1, 8
    halves = MarianSinusoidalPositionalEmbedding(length, features)
    weight = halves.create_weight() if hasattr(halves, "create_weight") else halves.weight
    return {
        "interleaved": SpeechT5ScaledPositionalEncoding(0.0, features, length).pe[0, POSITIONS].tolist(),
        "halves": torch.as_tensor(weight).detach()[POSITIONS].tolist(),
    }


def llama_attention():
    """Four query heads on two key/value heads, three queries at the end of seven keys."""
    import torch
    from transformers.models.llama.modeling_llama import eager_attention_forward

    torch.manual_seed(1)
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    may = torch.ones(3, 7, dtype=torch.bool).tril(diagonal=4)
    mask = torch.zeros(3, 7).masked_fill(~may, -math.inf)
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    out, weights = eager_attention_forward(module, query, key, value, mask, scaling=8**-0.5)
    return attention_golden(query, key, value, out, weights)


def bloom_attention():
    """BLOOM's attention layer with an identity for its output projection; six heads, so not a power of two."""
    import torch
    from transformers import BloomConfig
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    torch.manual_seed(2)
    heads, head_dim, length = 6, 4, 9
    config = BloomConfig(hidden_size=heads * head_dim, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0)
    layer = BloomAttention(config, layer_idx=0).eval()
    layer.query_key_value.weight.data.normal_(std=0.5)
    layer.dense.weight.data.copy_(torch.eye(heads * head_dim))
    layer.dense.bias.data.zero_()
    hidden = torch.randn(1, length, heads * head_dim)
    query, key, value = layer._reshape(layer.query_key_value(hidden))
    alibi = build_alibi_tensor(torch.ones(1, length), heads, torch.float32)
    mask = torch.zeros(length, length).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    out, weights = layer(hidden, torch.zeros_like(hidden), alibi, mask)
    return attention_golden(query, key, value, out.reshape(1, length, heads, head_dim), weights)


def t5_attention():
    """T5's attention layer, as an encoder and as a decoder, with an identity for its output projection.

    T5 leaves out 1/√d: queries are stored times √d, for attention that has it.
    """
    import torch
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    heads, head_dim, length = 2, 4, 24
    goldens = {}
    for name, is_decoder in (("t5_bidirectional", False), ("t5_causal", True)):
        torch.manual_seed(3)
        config = T5Config(
            d_model=heads * head_dim, d_kv=head_dim, num_heads=heads, is_decoder=is_decoder, dropout_rate=0.0,
            relative_attention_num_buckets=12, relative_attention_max_distance=16, attn_implementation="eager",
        )  # fmt: skip
        layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
        for linear in (layer.q, layer.k, layer.v):
            linear.weight.data.normal_(std=0.3)
        layer.o.weight.data.copy_(torch.eye(heads * head_dim))
        table = layer.relative_attention_bias.weight.data.normal_()
        hidden = torch.randn(1, length, heads * head_dim)
        query, key, value = (
            linear(hidden).view(1, length, heads, head_dim).transpose(1, 2) for linear in (layer.q, layer.k, layer.v)
        )
        may = torch.ones(length, length, dtype=torch.bool)
        may = may.tril() if is_decoder else may
        mask = torch.zeros(length, length).masked_fill(~may, -math.inf)[None, None]
        out, _, weights = layer(hidden, mask=mask)
        out = out.reshape(1, length, heads, head_dim)
        goldens[name] = attention_golden(query * head_dim**0.5, key, value, out, weights) | {"table": table.tolist()}
    return goldens


def attention_golden(query, key, value, out, weights):
    """Inputs as [B, T, N, H], output and entropy; torch has heads before time."""
    import torch

    entropy = torch.special.entr(weights).sum(-1)
    inputs = {name: x.transpose(1, 2).tolist() for name, x in (("query", query), ("key", key), ("value", value))}
    return inputs | {"out": out.tolist(), "entropy": entropy.tolist()}
