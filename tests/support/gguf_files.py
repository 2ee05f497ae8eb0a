"""GGUF files of the tiny published models, as llama.cpp's converter would make them, by the package `gguf`."""

from pathlib import Path
from typing import Any

import numpy as np

# The architectures whose queries and keys llama.cpp rotates by pairs of neighbours.
PAIRS = {"llama", "smollm3", "granite"}
NAMES = {"gpt_neox": "gptneox", "gemma3_text": "gemma3"}
# Matrices of GPT-2 that multiply from the left.
LEFT = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_gguf(
    file: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    quantised: str | None = None,
    tokenizer: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> Path:
    """Write a model of a Hugging Face folder as GGUF; matrices `quantised` as that, if given."""
    import gguf

    arch = NAMES.get(config["model_type"], config["model_type"])
    config = {"num_key_value_heads": None, **config}
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    width, heads, layers, inner, length = (
        next((config[name] for name in names if name in config), None)
        for names in (
            ("hidden_size", "n_embd"),
            ("num_attention_heads", "n_head"),
            ("num_hidden_layers", "n_layer"),
            ("intermediate_size", "n_inner"),
            ("max_position_embeddings", "n_positions", "seq_length"),
        )
    )
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(length)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner or 4 * width)
    writer.add_head_count(heads)
    if arch in ("gpt2", "gptneox", "bloom"):
        writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
        if arch == "gptneox":
            writer.add_rope_dimension_count(int(config["rotary_pct"] * (width // heads)))
            writer.add_parallel_residual(config.get("use_parallel_residual", True))
        if arch == "bloom":
            writer.add_head_count_kv(heads)
    else:
        head_dim = config.get("head_dim") or width // heads
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5 if arch == "olmo2" else 1e-6))
        writer.add_rope_freq_base(config.get("rope_theta", 1e4))
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if arch == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    for name, value in (tokenizer or {}).items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)](key, value)
    for name, value in (more or {}).items():
        {int: writer.add_uint32, str: writer.add_string}[type(value)](name, value)
    names = gguf.get_tensor_name_map(kind, layers)
    for name, tensor in tensors.items():
        own = names.get_name(
            name.removeprefix("transformer.") if arch == "bloom" else name, try_suffixes=(".weight", ".bias")
        )
        assert own is not None, name
        if arch in PAIRS and ("q_proj" in name or "k_proj" in name):
            own_heads = heads if "q_proj" in name else config["num_key_value_heads"]
            halves = tensor.reshape(own_heads, 2, -1, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        if arch in ("gptneox", "bloom") and "query_key_value" in name:
            tensor = np.concatenate(list(np.moveaxis(tensor.reshape(heads, 3, -1, *tensor.shape[1:]), 1, 0)))
            tensor = np.ascontiguousarray(tensor.reshape(-1, *tensor.shape[2:]))
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        if arch == "gpt2" and name.endswith(LEFT):
            tensor = np.ascontiguousarray(tensor.T)
        if quantised and tensor.ndim == 2:
            number = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(own, gguf.quants.quantize(tensor, number), raw_dtype=number)
        else:
            writer.add_tensor(own, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
