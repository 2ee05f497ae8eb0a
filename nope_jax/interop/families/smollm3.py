"""SmolLM 3: Llama with some layers without positions, which have windows if switched on
(transformers: models/smollm3)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import Encoding, NoPE
from nope_jax.interop.families.family import GGUF, Family, read_biases, read_shape, write_shape
from nope_jax.interop.families.llama import PRE_NORMS, WEIGHTS, gguf_settings, gguf_weights
from nope_jax.interop.rotary import (
    per_layer,
    read_rope,
    read_windows,
    shortest_period,
    split_window,
    windowed,
    write_rope,
    write_windows,
)
from nope_jax.interop.settings import Settings


def read(settings: Settings) -> ModelConfig:
    shape = read_shape(settings, tied=True)
    layers = shape["num_layers"]
    rope = read_rope(settings, shape["head_dim"], base=2e6)
    interval, turned = settings.integer("no_rope_layer_interval", 4), settings.get("no_rope_layers")
    if turned is None:
        turned = [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(turned) < layers:
        raise ValueError(f"{settings.where}: no_rope_layers has {len(turned)} entries for {layers} layers")
    switched_on = settings.choice("use_sliding_window", False, {True: True, False: False})
    window = settings.get("sliding_window") if switched_on else None
    settings.ignore("sliding_window")
    windows = read_windows(settings, layers, lambda layer: not turned[layer], window)
    inner: list[Encoding] = [rope if turned[layer] else NoPE() for layer in range(layers)]
    return ModelConfig(
        **shape,
        biases=read_biases(settings, attention_bias=("qkv", "out"), mlp_bias=("mlp",)),
        encoding=shortest_period([windowed(*both) for both in zip(inner, windows, strict=True)]),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    windows = write_windows(config)
    inner = [split_window(encoding)[0] for encoding in per_layer(config)]
    return (
        write_shape(config)
        | write_rope(config)
        | windows
        | {
            "use_sliding_window": windows["sliding_window"] is not None,
            "no_rope_layers": [int(encoding != NoPE()) for encoding in inner],
            "attention_bias": "qkv" in config.biases,
            "mlp_bias": "mlp" in config.biases,
        }
    )


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("smollm3", gguf_weights(*PRE_NORMS, pairs=True), gguf_settings),
)
