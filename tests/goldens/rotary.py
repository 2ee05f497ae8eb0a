"""RoPE and its scalings as Llama, Phi-3 and GPT-NeoX turn queries and keys with them (`regenerate.py`)."""

# Small positions: float32 angles are good to position · 2⁻²⁴ rad, and the goldens are to hold at 1e-5.
POSITIONS = [0, 1, 2, 5, 17, 31]
FAR = [0, 1, 2, 5, 17, 63]
HEAD_DIM = 16

RAMP = {"base": 500.0, "factor": 4.0, "original_length": 64, "beta_fast": 6.0, "beta_slow": 0.5}
FACTORS = {
    "short_factors": [1.0, 1.02, 1.1, 1.25, 1.3, 1.5, 1.9, 2.2],
    "long_factors": [1.0, 1.2, 2.1, 3.4, 4.0, 6.5, 7.9, 8.3],
    "original_length": 32,
    "factor": 4.0,
}
LLAMA3 = {"factor": 8.0, "original_length": 8192, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0}
PHI3 = {
    "dim": 96,
    "factor": 32.0,
    "original_length": 4096,
    "short_factors": [1 + m / 64 for m in range(48)],
    "long_factors": [1 + m * m / 40 for m in range(48)],
}

# Heads that are turned, by short lengths, so that ramps and borders lie within a head of 16. A name begins with the
# rope type that transformers knows.
TURNED = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic_below": {"factor": 4.0, "original_length": 32},
    "dynamic_above": {"positions": FAR, "factor": 4.0, "original_length": 32},
    "yarn": {"positions": FAR, "factor": 8.0, "original_length": 4096},
    "yarn_settings": {"positions": FAR, **RAMP, "attention_factor": 1.3},
    "yarn_exact_ends": {"positions": FAR, **RAMP, "truncate": False},
    "yarn_partial": {"positions": FAR, "rotary_dim": 8, "factor": 4.0, "original_length": 2048},
    "longrope_short": FACTORS,
    "longrope_long": {"positions": FAR, **FACTORS},
    "longrope_factor": {"positions": FAR, **FACTORS, "attention_factor": 1.19},
    "llama3": {"positions": FAR, **LLAMA3, "original_length": 64},
}

# Full-size heads, as in published models, at lengths on both sides of the original one where it matters.
FREQUENCIES = {
    "default": {"base": 500_000.0},
    "linear": {"factor": 3.0},
    **{f"dynamic_{n}": {"length": n, "factor": 4.0, "original_length": 2048} for n in (1, 2048, 2049, 5000, 65_536)},
    "yarn_qwen": {"base": 1e6, "factor": 4.0, "original_length": 32_768},
    "yarn_gpt_oss": {"base": 150_000.0, "dim": 64, "factor": 32.0, "original_length": 4096, "truncate": False},
    **{f"longrope_{n}": {"length": n, **PHI3} for n in (4096, 4097)},
    "llama3_1": {"base": 500_000.0, **LLAMA3},
    "llama3_2": {"base": 500_000.0, "dim": 64, **LLAMA3, "factor": 32.0},
}

# Names of our fields, and those of transformers' `rope_parameters`.
FIELDS = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
}


def make():
    """All goldens, as a tree of lists and numbers."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(1, len(POSITIONS), 2, HEAD_DIM)
    return {
        "x": x.tolist(),
        "turned": {name: turned(x, name.split("_")[0], **case) for name, case in TURNED.items()},
        "frequencies": {name: frequencies(name.split("_")[0], **case) for name, case in FREQUENCIES.items()},
        "attention": yarn_attention(),
    }


def rotary(rope_type, base, head_dim, rotary_dim, settings):
    """transformers' module of a rope type, from the model family that uses it."""
    from transformers import GPTNeoXConfig, LlamaConfig, Phi3Config
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    parameters = {FIELDS[name]: x for name, x in settings.items()}
    length = settings.get("original_length", 2048)
    if rope_type == "dynamic":  # its yardstick is the model's length
        del parameters["original_max_position_embeddings"]
    elif "factor" in settings:
        length = int(length * settings["factor"])
    parameters |= {"rope_type": rope_type, "rope_theta": base, "partial_rotary_factor": rotary_dim / head_dim}
    common = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "max_position_embeddings": length}
    if rotary_dim != head_dim:
        return GPTNeoXRotaryEmbedding(GPTNeoXConfig(rope_parameters=parameters, **common))
    if rope_type == "longrope":
        original = settings["original_length"]
        config = Phi3Config(
            rope_parameters=parameters, original_max_position_embeddings=original, pad_token_id=0, **common
        )
        return Phi3RotaryEmbedding(config)
    return LlamaRotaryEmbedding(LlamaConfig(rope_parameters=parameters, **common))


def turned(x, rope_type, *, positions=POSITIONS, base=10_000.0, rotary_dim=HEAD_DIM, **settings):
    """x turned as queries are."""
    import torch
    from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
    from transformers.models.llama import modeling_llama as llama

    module = rotary(rope_type, base, HEAD_DIM, rotary_dim, settings)
    cos, sin = module(x, torch.tensor([positions]))
    apply = (llama if rotary_dim == HEAD_DIM else gpt_neox).apply_rotary_pos_emb
    out = apply(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0].transpose(1, 2)
    call = {"base": base, "rotary_dim": rotary_dim}
    return {"settings": settings, "call": call, "positions": positions, "out": out.tolist()}


def frequencies(rope_type, *, base=10_000.0, dim=128, length=1, **settings):
    """Frequencies with so many positions in use, and what cosines and sines are multiplied by."""
    import torch

    module = rotary(rope_type, base, dim, dim, settings)
    module(torch.zeros(1), torch.tensor([[length - 1]]))
    return {
        "settings": settings,
        "call": {"dim": dim, "base": base, "length": length},
        "frequencies": module.inv_freq.tolist(),
        "amplitude": float(module.attention_scaling),
    }


def yarn_attention():
    """Llama's attention layer with YaRN and an identity for its output projection; two heads to a key/value head."""
    import math

    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    torch.manual_seed(1)
    heads, kv_heads, head_dim, length = 4, 2, 8, 24
    settings = {"factor": 8.0, "original_length": 1024}
    parameters = {"rope_type": "yarn", "rope_theta": 10_000.0} | {FIELDS[name]: x for name, x in settings.items()}
    config = LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=8192, attn_implementation="eager", rope_parameters=parameters,
    )  # fmt: skip
    layer = LlamaAttention(config, layer_idx=0).eval()
    for linear in (layer.q_proj, layer.k_proj, layer.v_proj):
        linear.weight.data.normal_(std=0.3)
    layer.o_proj.weight.data.copy_(torch.eye(heads * head_dim))
    hidden = torch.randn(1, length, heads * head_dim)
    mask = torch.zeros(length, length).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    where = LlamaRotaryEmbedding(config)(hidden, torch.arange(length)[None])
    out, weights = layer(hidden, position_embeddings=where, attention_mask=mask[None, None])
    inputs = {"query": layer.q_proj, "key": layer.k_proj, "value": layer.v_proj}
    return {
        "settings": settings,
        **{name: linear(hidden).view(1, length, -1, head_dim).tolist() for name, linear in inputs.items()},
        "out": out.view(1, length, heads, head_dim).tolist(),
        "entropy": torch.special.entr(weights).sum(-1).tolist(),
    }
