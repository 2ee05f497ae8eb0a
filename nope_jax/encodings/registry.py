"""The registry: encodings, wrappers and schedules by name."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from nope_jax.encodings.absolute import ComplexOrder, Hierarchical, Learned, Multiplicative, Sinusoidal
from nope_jax.encodings.bias import FIRE, KERPLE, T5, ALiBi
from nope_jax.encodings.contextual import CoPE, Forgetting
from nope_jax.encodings.convolution import Convolution
from nope_jax.encodings.encoding import Encoding
from nope_jax.encodings.logit_scale import HeadScale, Llama4Scale, LogN, SSMax, SwanScale, UniformScale
from nope_jax.encodings.nope import NoPE
from nope_jax.encodings.randomized import Randomized
from nope_jax.encodings.recurrent import FLOATER, Recursive
from nope_jax.encodings.relative import NEZHA, TUPE, DeBERTa, Shaw, TransformerXL
from nope_jax.encodings.rotary import RoPE, XPos
from nope_jax.encodings.schedules import SCHEDULES, Chunked, Windowed
from nope_jax.encodings.sink import AttentionSink
from nope_jax.encodings.wrapper import Wrapper

ENCODINGS: Mapping[str, type[Encoding]] = MappingProxyType(
    {
        "nope": NoPE,
        "learned": Learned,
        "hierarchical": Hierarchical,
        "sinusoidal": Sinusoidal,
        "multiplicative": Multiplicative,
        "complex": ComplexOrder,
        "recursive": Recursive,
        "floater": FLOATER,
        "convolution": Convolution,
        "randomized": Randomized,
        "rope": RoPE,
        "xpos": XPos,
        "alibi": ALiBi,
        "t5": T5,
        "kerple": KERPLE,
        "fire": FIRE,
        "shaw": Shaw,
        "nezha": NEZHA,
        "transformer_xl": TransformerXL,
        "tupe": TUPE,
        "deberta": DeBERTa,
        "cope": CoPE,
        "forgetting": Forgetting,
        "log_n": LogN,
        "uniform_scale": UniformScale,
        "head_scale": HeadScale,
        "ssmax": SSMax,
        "llama4_scale": Llama4Scale,
        "swan_scale": SwanScale,
        "windowed": Windowed,
        "chunked": Chunked,
        "attention_sink": AttentionSink,
    }
)
"""All encodings by name; called without arguments, each has its paper's settings."""


def resolve(spec: str | Encoding | tuple[str | Encoding, ...]) -> tuple[Encoding, ...]:
    """Return the encodings of one period of layers.

    Args:
        spec: An encoding, a name in ENCODINGS or SCHEDULES, "wrapper:name" for a wrapper around the named encoding or
            schedule ("log_n:rope", "head_scale:smollm3"), or a tuple of these.

    Raises:
        ValueError: An unknown name, a prefix that is not a wrapper, or an empty tuple.
    """
    if isinstance(spec, Encoding):
        return (spec,)
    if isinstance(spec, str):
        name, colon, inner = spec.partition(":")
        if colon:
            wrappers = {name: cls for name, cls in ENCODINGS.items() if issubclass(cls, Wrapper)}
            if name not in wrappers:
                raise ValueError(f"{name!r} in {spec!r} must be a wrapper: choose from {', '.join(wrappers)}")
            if not inner:
                raise ValueError(f"{spec!r} must name what it wraps after the colon")
            return tuple(wrappers[name](encoding) for encoding in resolve(inner))
        return _find(name)
    if not isinstance(spec, tuple | list) or not spec:
        raise ValueError(f"encoding must be a name, an Encoding or a non-empty tuple of them, not {spec!r}")
    return tuple(encoding for part in spec for encoding in resolve(part))


def _find(name: str) -> tuple[Encoding, ...]:
    """The encodings for a single name."""
    if name in ENCODINGS:
        return (ENCODINGS[name](),)
    if name in SCHEDULES:
        return SCHEDULES[name]
    known = [*ENCODINGS, *SCHEDULES]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown encoding {name!r}: {hint}choose from {', '.join(known)}")
