"""Tiny published models of every family: one config.json for each way in which a family can vary.

Weights come from a formula of their name and shape, so that a test needs no torch and a golden no stored weights.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 24
"""Trained length of all of them."""

POSITIONS, VOCABULARY = [0, 5, LENGTH - 1, -1], [0, 1, 17, 30, 47]
"""Where the goldens have logits."""

_LLAMA: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_FALCON = {name: value for name, value in _NEOX.items() if name != "intermediate_size"}
_T5 = {
    "vocab_size": 48, "d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 4, "n_positions": LENGTH,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "num_decoder_layers": 3,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "llama biases, tied, head_dim": {
        "model_type": "llama", **_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "head_dim": 12, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "hidden_act": "gelu_new",
    },
    "llama linear": {"model_type": "llama", **_LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama dynamic": {"model_type": "llama", **_LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama yarn": {"model_type": "llama", **_LLAMA, "rope_scaling": _YARN},
    "llama yarn, all settings": {
        "model_type": "llama", **_LLAMA,
        "rope_parameters": {
            **_YARN, "rope_theta": 100.0, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False,
            "mscale": 1.0, "mscale_all_dim": 0.5,
        },
    },
    "llama longrope": {
        "model_type": "llama", **_LLAMA, "rope_scaling": {**_LONG, "original_max_position_embeddings": 12}
    },
    "llama proportional": {
        "model_type": "llama", **_LLAMA,
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "llama 3": {
        "model_type": "llama", **_LLAMA, "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 16}
    },
    "llama without positions": {"model_type": "llama", **_LLAMA, "nope": True},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 7, "head_dim": 16},
    "mistral without window": {"model_type": "mistral", **_LLAMA, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen2 windows": {
        "model_type": "qwen2", **_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2
    },
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 16, "attention_bias": True},
    "qwen3 layer types": {
        "model_type": "qwen3", **_LLAMA, "head_dim": 16, "use_sliding_window": True, "sliding_window": 6,
        "layer_types": _MIXED, "rope_scaling": _YARN,
    },
    "smollm3": {"model_type": "smollm3", **_LLAMA, "rope_theta": 5e6},
    "smollm3 windows": {
        "model_type": "smollm3", **_LLAMA, "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True,
        "sliding_window": 6, "tie_word_embeddings": False,
    },
    "olmo2": {"model_type": "olmo2", **_LLAMA},
    "olmo3": {"model_type": "olmo3", **_LLAMA, "sliding_window": 6, "rope_scaling": _YARN},
    "olmo3 rope parameters": {
        "model_type": "olmo3", **_LLAMA, "sliding_window": 6, "layer_types": _MIXED, "num_hidden_layers": 4,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e4, **_YARN},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "granite": {
        "model_type": "granite", **_LLAMA, "embedding_multiplier": 12.0, "attention_multiplier": 0.2,
        "residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True,
    },
    "exaone4": {"model_type": "exaone4", **_LLAMA, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    "exaone4 windows": {
        "model_type": "exaone4", **_LLAMA, "sliding_window": 6, "sliding_window_pattern": 3, "rope_theta": 1e6
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 48, "n_positions": LENGTH, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "bos_token_id": None, "eos_token_id": None,
    },
    "gpt2 untied, n_inner": {
        "model_type": "gpt2", "vocab_size": 48, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2,
        "n_inner": 40, "activation_function": "gelu", "scale_attn_weights": False, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_NEOX, "rotary_pct": 0.5},
    "gpt_neox sequential, linear": {
        "model_type": "gpt_neox", **_NEOX, "use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 100,
        "rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_act": "relu", "tie_word_embeddings": True,
        "attention_bias": False,
    },
    "gptj": {
        "model_type": "gptj", "vocab_size": 48, "n_positions": 3 * LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "rotary_dim": 4, "bos_token_id": None, "eos_token_id": None,
    },
    "bloom": {
        "model_type": "bloom", "vocab_size": 48, "hidden_size": 32, "n_layer": 2, "n_head": 4,
        "bos_token_id": None, "eos_token_id": None,
    },
    "bloom untied, 6 heads": {
        "model_type": "bloom", "vocab_size": 48, "hidden_size": 24, "n_layer": 2, "n_head": 6,
        "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "bos_token_id": None, "eos_token_id": None,
    },
    "mpt": {
        "model_type": "mpt", "vocab_size": 48, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 3 * LENGTH
    },
    "mpt 6 heads, scaled": {
        "model_type": "mpt", "vocab_size": 48, "d_model": 24, "n_layers": 2, "n_heads": 6, "max_seq_len": 3 * LENGTH,
        "attn_config": {"softmax_scale": 0.4}, "tie_word_embeddings": False,
    },
    "falcon": {"model_type": "falcon", **_FALCON, "rope_theta": 500.0},
    "falcon two norms": {
        "model_type": "falcon", **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40
    },
    "falcon grouped, one norm": {
        "model_type": "falcon", **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "falcon alibi": {
        "model_type": "falcon", **_FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False
    },
    "cohere": {"model_type": "cohere", **_LLAMA, "logit_scale": 0.25, "attention_bias": True},
    "cohere2": {"model_type": "cohere2", **_LLAMA, "sliding_window": 6, "tie_word_embeddings": False},
    "cohere2 layer types": {
        "model_type": "cohere2", **_LLAMA, "sliding_window": 6, "layer_types": _MIXED, "rope_theta": 100.0,
        "layer_norm_eps": 1e-3,
    },
    "gemma": {"model_type": "gemma", **_LLAMA, "head_dim": 12, "hidden_act": "gelu"},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "gemma2 without caps": {
        "model_type": "gemma2", **_LLAMA, "head_dim": 12, "sliding_window": 6, "layer_types": ["full_attention"] * 4,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
        "hidden_activation": "silu", "tie_word_embeddings": False,
    },
    "gemma2 caps that bite": {
        "model_type": "gemma2", **_LLAMA, "head_dim": 12, "sliding_window": 6, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text", **_LLAMA, "head_dim": 12, "sliding_window": 6, "sliding_window_pattern": 2,
        "rope_theta": 1e3, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3 rope parameters": {
        "model_type": "gemma3_text", **_LLAMA, "head_dim": 12, "sliding_window": 6, "layer_types": _MIXED,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_theta": 50.0, **_YARN},
        },
    },
    "t5": {"model_type": "t5", **_T5},
    "t5 1.1": {"model_type": "t5", **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "codellm": {"model_type": "custom_decoder_only_t5", **_T5, "position_encoding_type": "none"},
    "codellm rotary": {
        "model_type": "custom_decoder_only_t5", **_T5, "position_encoding_type": "rotary", "tie_word_embeddings": False
    },
    "codellm alibi": {
        "model_type": "custom_decoder_only_t5", **_T5, "position_encoding_type": "alibi",
        "feed_forward_proj": "gated-silu",
    },
}  # fmt: skip
"""One config.json for each way in which a family can vary; the test's name by its key."""


def golden_tokens(max_length: int | None) -> np.ndarray:
    """The tokens of the goldens: twice the trained length where a model reads as many."""
    return tokens(2, min(max_length or 2 * LENGTH, 2 * LENGTH))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a tiny model: norms and scales around 1, the rest of about unit gain."""
    one = len(shape) == 1 and name.endswith("weight")
    scale = 0.6 if len(shape) == 1 else 4 / math.sqrt(shape[-1])
    bits = (np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))) * np.uint64(
        0x9E3779B97F4A7C15
    )
    bits = (bits ^ (bits >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)  # random bits, the same on every machine
    uniform = (bits >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
    return (scale * uniform + one).reshape(shape).astype(np.float32)


def write_folder(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a model: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {name: weight(name, shape) for name, shape in shapes.items()})
    return folder


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """The format a second time, for float32: a length, a header, the bytes."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors.values()))


def tokens(rows: int, length: int, vocabulary: int = 48) -> np.ndarray:
    numbers = np.arange(rows * length).reshape(rows, length)
    return (numbers**2 * 7 + numbers // 3) % (vocabulary - 1)


def padded(length: int, lengths: tuple[int, ...], side: str) -> Iterator[slice]:
    """Where the tokens of each row lie."""
    for own in lengths:
        yield slice(length - own, length) if side == "left" else slice(0, own)
