"""Wrappers that limit a layer's attention span, and the schedules over layers of released models."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from nope_jax.encodings.checks import integer_at_least
from nope_jax.encodings.encoding import AttentionSpan, Encoding
from nope_jax.encodings.logit_scale import Llama4Scale
from nope_jax.encodings.nope import NoPE
from nope_jax.encodings.rotary import RoPE
from nope_jax.encodings.wrapper import Wrapper


@dataclasses.dataclass(frozen=True)
class Windowed(Wrapper):
    """The inner encoding, in a layer whose queries see only the keys fewer than `window` positions away.

    Put a logit scale that counts keys outside this wrapper, not inside, so that it takes the window into account.

    Raises:
        ValueError: window is below 1.
    """

    window: int = 4096

    def __post_init__(self):
        super().__post_init__()
        integer_at_least(1, window=self.window)

    def span(self) -> AttentionSpan:
        inner = self.encoding.span()
        return inner._replace(window=min(self.window, inner.window or self.window))


@dataclasses.dataclass(frozen=True)
class Chunked(Wrapper):
    """The inner encoding, in a layer whose queries see only the keys of their own chunk of `chunk_size` positions.

    The first query of a chunk sees only itself. Put a logit scale that counts keys outside this wrapper, not inside, so
    that it takes the chunks into account.

    Raises:
        ValueError: chunk_size is below 1, or neither divides nor is a multiple of that of the inner encoding.
    """

    chunk_size: int = 8192

    def __post_init__(self):
        super().__post_init__()
        integer_at_least(1, chunk_size=self.chunk_size)
        inner = self.encoding.span().chunk_size
        if inner is not None and max(inner, self.chunk_size) % min(inner, self.chunk_size):
            raise ValueError(f"chunk_size must divide that of the encoding within, {inner}, or be a multiple of it")

    def span(self) -> AttentionSpan:
        inner = self.encoding.span()
        return inner._replace(chunk_size=min(self.chunk_size, inner.chunk_size or self.chunk_size))


SMOLLM3: tuple[Encoding, ...] = (*[RoPE(base=5_000_000.0)] * 3, NoPE())
"""SmolLM3 (Hugging Face 2025): every fourth layer has no positions, the others have RoPE with base 5·10⁶.

The base is that of the released model, which has a context of 64 k tokens. The idea comes from RNoPE (Yang et al. 2025,
arXiv 2501.18795), here with full attention in all layers."""

LLAMA4: tuple[Encoding, ...] = (*[Chunked(RoPE(base=500_000.0, interleaved=True), 8192)] * 3, Llama4Scale(NoPE()))
"""Llama 4 (Meta 2025, "iRoPE"): three RoPE layers in chunks of 8,192 tokens, then one layer with full attention, no
positions and a growing logit scale.

The settings are the defaults of the text configuration in transformers. For a checkpoint that scales its frequencies as
Llama 3 does, use `RoPE(..., scaling=Llama3Scaling(...))`. The L2 norm of rotated queries and keys in some checkpoints
does not concern positions and is left to the model."""

RNOPE_SWA: tuple[Encoding, ...] = (*[Windowed(RoPE(base=50_000.0, interleaved=True), 4096)] * 3, NoPE())
"""RNoPE-SWA (Yang et al. 2025, arXiv 2501.18795) as in Command R7B: three RoPE layers with a window of 4,096 tokens,
then one with full attention and no positions. The base is Command R7B's."""

SWAN_GPT: tuple[Encoding, ...] = (NoPE(), *[Windowed(RoPE(), 512)] * 3)
"""SWAN-GPT (Puvvada et al. 2025, arXiv 2504.08719): first one layer with full attention and no positions, then three
RoPE layers with a window of 512 tokens.

Past the training length its NoPE layers use `SwanScale`, which is not used in training and therefore not included."""

SCHEDULES: Mapping[str, tuple[Encoding, ...]] = MappingProxyType(
    {"smollm3": SMOLLM3, "llama4": LLAMA4, "rnope_swa": RNOPE_SWA, "swan_gpt": SWAN_GPT}
)
"""All schedules by name: the encodings of one period of layers, starting with the first layer.

The period repeats over the layers. For another window, chunk or base, write the tuple directly:
`(*[Windowed(RoPE(), 128)] * 3, NoPE())`.
"""
