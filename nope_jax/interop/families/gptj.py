"""GPT-J: attention and MLP in parallel after one norm, and RoPE for neighbouring dimensions of a part of each head
(transformers: models/gptj)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import RoPE
from nope_jax.interop.families.family import ACTIVATIONS, Family, read_heads, read_tied, write_activation
from nope_jax.interop.rotary import head_dim, per_layer
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight, linear

WEIGHTS = (
    Weight("transformer.wte.weight", "V D", "embedding"),
    *linear("transformer.h.{}.ln_1", "D", "attention_norm"),
    Weight("transformer.h.{}.attn.q_proj.weight", "(N H) D", "attention/query"),
    Weight("transformer.h.{}.attn.k_proj.weight", "(K H) D", "attention/key"),
    Weight("transformer.h.{}.attn.v_proj.weight", "(K H) D", "attention/value"),
    Weight("transformer.h.{}.attn.out_proj.weight", "D (N H)", "attention/out"),
    *linear("transformer.h.{}.mlp.fc_in", "F D", "mlp/up"),
    *linear("transformer.h.{}.mlp.fc_out", "D F", "mlp/down"),
    *linear("transformer.ln_f", "D", "norm"),
    *linear("lm_head", "V D", "head"),
)


def read(settings: Settings) -> ModelConfig:
    heads, size = read_heads(settings, "n_head", "n_embd"), settings.integer("rotary_dim", 64)
    settings.only("rotary", True)
    settings.only("scale_attn_weights", True)
    settings.ignore(*(name for name in settings if name.startswith("summary_")))
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer("n_layer"),
        **heads,
        mlp="plain",
        mlp_dim=settings.integer("n_inner", 4 * heads["model_dim"]),
        activation=settings.choice("activation_function", "gelu_new", ACTIVATIONS),
        norm="layer",
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        block="parallel_shared_norm",
        biases=("mlp", "norm", "head"),
        embedding_scale=1.0,
        tie_embeddings=read_tied(settings, False),
        encoding=RoPE(rotary_dim=size, interleaved=True),
        train_length=settings.integer("n_positions", 2048),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    rope = per_layer(config)[0]
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.model_dim,
        "n_inner": config.mlp_size,
        "n_positions": config.train_length,
        "rotary_dim": (rope.rotary_dim if isinstance(rope, RoPE) else None) or head_dim(config),
        "activation_function": write_activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILY = Family(
    name="gptj",
    architecture="GPTJForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="transformer.",
    ignored=(r".*\.attn\.(bias|masked_bias)",),  # the causal mask, which old versions saved
)
