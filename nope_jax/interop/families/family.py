"""What a family of published models is, and what many of them say alike."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.interop.rotary import head_dim
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""`hidden_act` of config.json to `model.activation`."""


@dataclasses.dataclass(frozen=True)
class GGUF:
    """A family as llama.cpp names it."""

    architecture: str
    """`general.architecture`."""
    weights: tuple[Weight, ...]
    settings: Callable[[Settings, GGUFHeader], dict[str, Any]]
    """From the metadata under the architecture's name to the settings of config.json."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published models: names and places of its tensors, and its settings, in and out."""

    name: str
    """`model_type` of config.json."""
    architecture: str
    """Class of transformers, in `architectures` of config.json."""
    former_architectures: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    """Other names of the same class, in older files."""
    weights: tuple[Weight, ...]
    read: Callable[[Settings], ModelConfig]
    """From config.json. Every setting that it does not read and that is not known to be harmless is refused."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """To config.json, as far as it can: `save_pretrained` reads the result back, and refuses what has changed."""
    prefix: str = "model."
    """What the names of tensors start with, but not in files saved from the model without its head."""
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    """Patterns of the names of tensors that hold no weights of the decoder, unless its table says otherwise."""
    told_by_tensors: Callable[[ModelConfig, Callable[[], Collection[str]]], ModelConfig] | None = None
    """What config.json does not tell but the names of the tensors do. To call for them opens the weights."""
    gguf: GGUF | None = None


def read_shape(
    settings: Settings,
    *,
    tied: bool = False,
    default_head_dim: int | None = None,
    norm: tuple[str, float] = ("rms_norm_eps", 1e-6),
    activation: tuple[str, str] = ("hidden_act", "silu"),
    length: int = 2048,
) -> dict[str, Any]:
    """The fields of ModelConfig that most families call by the same names.

    Args:
        settings: The config.json.
        tied: The family's default of tie_word_embeddings.
        default_head_dim: The family's default of head_dim. None: hidden_size / num_attention_heads.
        norm: The family's name and default of the norms' epsilon.
        activation: The family's name and default of the activation.
        length: The family's default of max_position_embeddings.
    """
    heads, width = settings.integer("num_attention_heads"), settings.integer("hidden_size")
    if settings.get("head_dim", default_head_dim) is None:
        read_heads(settings, "num_attention_heads", "hidden_size")
    settings.only("is_encoder_decoder", False)
    settings.only("add_cross_attention", False)
    return {
        "vocab_size": settings.integer("vocab_size"),
        "num_layers": settings.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": settings.integer("num_key_value_heads", heads),
        "head_dim": settings.integer("head_dim", default_head_dim or max(1, width // heads)),
        "model_dim": width,
        "mlp_dim": settings.integer("intermediate_size"),
        "activation": settings.choice(*activation, ACTIVATIONS),
        "norm_eps": settings.number(*norm),
        "embedding_scale": 1.0,
        "tie_embeddings": read_tied(settings, tied),
        "train_length": settings.integer("max_position_embeddings", length),
    }


def write_shape(config: ModelConfig, *, norm: str = "rms_norm_eps", activation: str = "hidden_act") -> dict[str, Any]:
    """The reverse of `read_shape`, given the family's names."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": head_dim(config),
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_size,
        activation: write_activation(config),
        norm: config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.train_length,
    }


def write_activation(config: ModelConfig) -> str:
    """`hidden_act` of a decoder."""
    own = config.activation or ("silu" if config.mlp == "gated" else "gelu_tanh")
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(own, own)


def read_heads(settings: Settings, heads: str, width: str) -> dict[str, Any]:
    """The fields of ModelConfig about heads that share the width among them, by the family's names.

    Raises:
        ValueError: their number does not divide the width.
    """
    count, total = settings.integer(heads), settings.integer(width)
    if total % count:
        raise ValueError(f"{settings.where}: {heads} {count} must divide {width} {total}")
    return {"num_heads": count, "model_dim": total}


def read_tied(settings: Settings, default: bool) -> bool:
    """`tie_word_embeddings`, given the family's default."""
    return settings.choice("tie_word_embeddings", default, {True: True, False: False})


def named(settings: Settings, *names: str) -> str:
    """The name that a file uses of one setting's several, today's first."""
    settings.ignore(*names)
    return next((name for name in names if settings.get(name) is not None), names[0])


def read_biases(settings: Settings, **kinds: tuple[str, ...]) -> Any:
    """`model.biases`, given what each switch of config.json stands for."""
    switches = {name: settings.choice(name, False, {True: True, False: False}) for name in kinds}
    return tuple(kind for name, own in kinds.items() if switches[name] for kind in own)


def gguf_shape(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    """The settings of config.json that most families have in GGUF by the same keys."""
    heads, width = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    head_dim = metadata.integer("attention.key_length", max(1, width // heads))
    metadata.only("attention.value_length", head_dim)
    metadata.only("expert_count", 0)
    metadata.ignore("vocab_size", "rope.scaling.finetuned", "expert_used_count")
    settings: dict[str, Any] = {
        "vocab_size": gguf_rows(header),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_size": width,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "max_position_embeddings": metadata.integer("context_length"),
        "partial_rotary_factor": metadata.integer("rope.dimension_count", head_dim) / head_dim,
    }
    if "rope.freq_base" in metadata:
        settings["rope_theta"] = metadata.number("rope.freq_base", 10_000.0)
    if scaling := _gguf_scaling(metadata, header):
        settings["rope_scaling"] = scaling
    return settings


def gguf_rows(header: GGUFHeader) -> int:
    """The number of rows of the embedding."""
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{header.path} has no tensor token_embd.weight")
    return header.tensors["token_embd.weight"].shape[0]


def _gguf_scaling(metadata: Settings, header: GGUFHeader) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if "rope_freqs.weight" in header.tensors:
        # Llama 3.1's scaling: what each frequency is divided by.
        info = header.tensors["rope_freqs.weight"]
        factors = np.fromfile(header.path, np.float32, info.shape[0], offset=info.offset).tolist()
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": metadata.integer("context_length"),
            "attention_factor": 1.0,
        }
    kind = metadata.choice("rope.scaling.type", "none", {"none": None, "linear": "linear", "yarn": "yarn"})
    if kind is None:
        metadata.ignore("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor")
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata.number("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = metadata.integer("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in metadata:
                scaling[name] = metadata.number(f"rope.scaling.yarn_{name}", 0.0)
        metadata.only("rope.scaling.attn_factor", 1.0)
    return scaling
