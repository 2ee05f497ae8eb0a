"""How causal transformers know where tokens stand, and what happens past the training length."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nope_jax.config import ModelConfig
    from nope_jax.models import Decoder, generate

__all__ = ["Decoder", "ModelConfig", "generate"]


def __getattr__(name: str) -> Any:
    # On demand: the attention functions alone need no Flax.
    if name in ("Decoder", "generate"):
        from nope_jax import models

        return getattr(models, name)
    if name == "ModelConfig":
        from nope_jax.config import ModelConfig

        return ModelConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
