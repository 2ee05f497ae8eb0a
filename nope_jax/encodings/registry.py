"""What names stand for: encodings, wrappers around them, and schedules over layers."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from nope_jax.encodings.absolute import Learned, Sinusoidal
from nope_jax.encodings.bias import T5, ALiBi
from nope_jax.encodings.encoding import Encoding
from nope_jax.encodings.nope import NoPE
from nope_jax.encodings.rotary import RoPE
from nope_jax.encodings.wrapper import Wrapper

ENCODINGS: Mapping[str, type[Encoding]] = MappingProxyType(
    {
        "nope": NoPE,
        "learned": Learned,
        "sinusoidal": Sinusoidal,
        "rope": RoPE,
        "alibi": ALiBi,
        "t5": T5,
    }
)
"""Every encoding that a name stands for; called without arguments it has its paper's settings."""

SCHEDULES: Mapping[str, tuple[Encoding, ...]] = MappingProxyType({})
"""Every schedule over layers that a name stands for: the encodings of one period."""


def resolve(spec: str | Encoding | tuple[str | Encoding, ...]) -> tuple[Encoding, ...]:
    """The encodings of one period of layers.

    Args:
        spec: An encoding, a name in ENCODINGS or SCHEDULES, "wrapper:name" for a wrapper around what the name stands
            for ("log_n:rope", "head_scale:smollm3"), or a tuple of these.

    Raises:
        ValueError: A name that is none, a prefix that is not a wrapper's, or an empty tuple.
    """
    if isinstance(spec, Encoding):
        return (spec,)
    if isinstance(spec, str):
        name, colon, inner = spec.partition(":")
        if colon:
            wrapper = _find(name)[0]
            if not isinstance(wrapper, Wrapper):
                wrappers = ", ".join(name for name, cls in ENCODINGS.items() if issubclass(cls, Wrapper))
                raise ValueError(f"{name!r} in {spec!r} must be a wrapper: choose from {wrappers}")
            return tuple(type(wrapper)(encoding) for encoding in resolve(inner))
        return _find(name)
    if not isinstance(spec, tuple | list) or not spec:
        raise ValueError(f"encoding must be a name, an Encoding or a non-empty tuple of them, not {spec!r}")
    return tuple(encoding for part in spec for encoding in resolve(part))


def _find(name: str) -> tuple[Encoding, ...]:
    """What a single name stands for."""
    if name in ENCODINGS:
        return (ENCODINGS[name](),)
    if name in SCHEDULES:
        return SCHEDULES[name]
    known = [*ENCODINGS, *SCHEDULES]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown encoding {name!r}: {hint}choose from {', '.join(known)}")
