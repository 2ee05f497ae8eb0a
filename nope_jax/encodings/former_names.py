"""Former names, for the workdirs and encodings written with them.

These names were replaced in November 2026. A config.json and the code stored in a workdir are read as if they used the
new names; the documentation shows only the new ones.
"""

import warnings
from typing import Any

CONFIG = {
    "start_from": "init_from",
    "llama4_temperature": "llama4_scale",
    "swan_temperature": "swan_scale",
}
"""Former names of fields and encodings in a config.json."""

PUBLIC = {
    "Sizes": "ModelDims",
    "Tokens": "TokenInputs",
    "Reach": "AttentionSpan",
    "Block": "Tile",
    "Llama4Temperature": "Llama4Scale",
    "SwanTemperature": "SwanScale",
    "temperature_product": "logit_scale_product",
}
"""Former names in `nope_jax.encodings`."""

METHODS = {
    "temperature": "logit_scale",
    "with_sizes": "bind",
    "core": "unwrapped",
    "reach": "span",
    "lookback": "input_context",
}
"""Former names of methods of `Encoding`."""


def from_config(name: str) -> str:
    """Translate a name in a config.json to the current one, each part of "wrapper:name" separately."""
    return ":".join(CONFIG.get(part, part) for part in name.split(":"))


def adopt_methods(cls: type) -> None:
    """Let a subclass of `Encoding`, or a mixin of it, override a method by its former name."""
    for old, new in METHODS.items():
        owner = next((base for base in cls.__mro__ if old in base.__dict__ or new in base.__dict__), cls)
        if new not in owner.__dict__ and old in owner.__dict__:
            warnings.warn(f"{owner.__name__}.{old} is now called {new}", DeprecationWarning, stacklevel=3)
            setattr(cls, new, owner.__dict__[old])


def method(encoding: Any, name: str) -> Any:
    """The `__getattr__` of `Encoding`."""
    if name not in METHODS:
        raise AttributeError(f"{type(encoding).__name__!r} object has no attribute {name!r}")
    warnings.warn(f"{name} is now called {METHODS[name]}", DeprecationWarning, stacklevel=3)
    return getattr(encoding, METHODS[name])


def public(name: str, module: dict[str, Any]) -> Any:
    """The `__getattr__` of `nope_jax.encodings`."""
    if name not in PUBLIC:
        raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now called {PUBLIC[name]}", DeprecationWarning, stacklevel=3)
    return module[PUBLIC[name]]
