"""Gemma 3, text alone: Gemma 2 with QK norm in place of soft caps, and windows in five of six layers, whose RoPE has a
base of its own (transformers: models/gemma3)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.encodings import RoPE
from nope_jax.interop.families.family import GGUF, Family
from nope_jax.interop.families.gemma import gguf_table
from nope_jax.interop.families.gemma2 import GGUF_NORMS, WEIGHTS, gguf_settings_2, read_common_2, write_common_2
from nope_jax.interop.rotary import (
    head_dim,
    per_layer,
    read_rope,
    read_windows,
    rope_parameters,
    shortest_period,
    split_window,
    windowed,
    write_windows,
)
from nope_jax.interop.settings import Settings

_BASES = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


def read(settings: Settings) -> ModelConfig:
    fields = read_common_2(settings, logits_softcap=None, length=131_072)
    settings.only("attn_logit_softcapping", None)  # transformers leaves it unused
    nested, scaling = settings.get("rope_parameters") or {}, settings.get("rope_scaling")
    if nested.keys() - _BASES:
        raise ValueError(f"{settings.where}: rope_parameters must be given for {' and '.join(_BASES)}")
    ropes = {}
    for kind, (name, default) in _BASES.items():
        parameters = dict(nested.get(kind) or {})
        if scaling and kind == "full_attention":
            parameters = {name: parameters[name] for name in parameters if name == "rope_theta"} | scaling
        parameters.setdefault("rope_theta", settings.number(name, default))
        own = {"rope_parameters": parameters, "max_position_embeddings": fields["train_length"]}
        ropes[kind] = read_rope(Settings(own, f"{settings.where}: {kind}"), fields["head_dim"])
    settings.ignore("_sliding_window_pattern")  # what transformers 5 made layer_types of
    window = settings.integer("sliding_window", 4096)
    pattern = settings.integer("sliding_window_pattern", 6)
    windows = read_windows(settings, fields["num_layers"], lambda layer: (layer + 1) % pattern != 0, window)
    return ModelConfig(
        **fields,
        qk_norm="head",
        encoding=shortest_period(
            [windowed(ropes["sliding_attention" if own else "full_attention"], own) for own in windows]
        ),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    ropes: dict[str, RoPE] = {}
    for encoding in per_layer(config):
        inner, window = split_window(encoding)
        if isinstance(inner, RoPE):
            ropes.setdefault("full_attention" if window is None else "sliding_attention", inner)
    nested = {kind: rope_parameters(rope, head_dim(config)) for kind, rope in ropes.items()}
    windows = {name: value for name, value in write_windows(config).items() if value is not None}
    settings = write_common_2(config) | windows
    for kind, (name, _) in _BASES.items():
        if kind in nested:
            settings[name] = nested[kind]["rope_theta"]
    scaled = {kind for kind in nested if nested[kind]["rope_type"] != "default"}
    if scaled <= {"full_attention"}:  # what versions of transformers before 5 can read, too
        full = {name: value for name, value in nested.get("full_attention", {}).items() if name != "rope_theta"}
        return settings | {"rope_scaling": full if scaled else None}
    return settings | {"rope_parameters": nested}


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    metadata.only("attention.sliding_window_pattern", 6)
    metadata.only("rope.freq_base_swa", 10_000.0)
    return {"rope_theta": 1e6, **gguf_settings_2(metadata, header, largest=62)}


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("gemma3", gguf_table(*GGUF_NORMS), gguf_settings),
)
