"""Positional encodings of causal transformers, and their behaviour past the training length."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nope_jax.config import ModelConfig
    from nope_jax.models import Decoder, generate, generate_stream

__all__ = ["Decoder", "ModelConfig", "generate", "generate_stream"]


def __getattr__(name: str) -> Any:
    # Imported on demand, so that the attention functions work without Flax and the decoder's other dependencies.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module("nope_jax.config" if name == "ModelConfig" else "nope_jax.models")
    except ModuleNotFoundError as error:
        raise ImportError(f"nope_jax.{name} needs {error.name}: pip install 'nope_jax[train]'") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
