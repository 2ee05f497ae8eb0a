"""Schedules over layers: which encoding each layer of a period has, and how far it sees; those of released models."""

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
    """The encoding within, in a layer whose queries see only the keys fewer than `window` positions away.

    A logit scale that counts keys has to be around it, not within, to know of the window.

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
    """The encoding within, in a layer whose queries see only the keys of their own chunk of `chunk_size` positions.

    The first query of a chunk sees itself alone, whatever came before. A logit scale that counts keys has to be around
    it, not within, to know of the chunks.

    Raises:
        ValueError: chunk_size is below 1, or the encoding within has chunks that do not fit together with these.
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
"""SmolLM3 (Hugging Face 2025): every fourth layer has no positions, the others RoPE with base 5·10⁶.

The base is that of the released model, which reads 64 k tokens.

The idea is RNoPE's (Yang et al. 2025, arXiv 2501.18795), here with full attention in all layers."""

LLAMA4: tuple[Encoding, ...] = (*[Chunked(RoPE(base=500_000.0, interleaved=True), 8192)] * 3, Llama4Scale(NoPE()))
"""Llama 4 (Meta 2025, "iRoPE"): three RoPE layers in chunks of 8,192 tokens, then one that sees all, without positions
and with a logit scale that grows.

The settings are the defaults of the text configuration in transformers. A checkpoint that scales its frequencies as
Llama 3 does has `RoPE(..., scaling=Llama3Scaling(...))` here. The L2 norm of turned queries and keys, which some of the
checkpoints have, is no matter of positions and left to the model."""

RNOPE_SWA: tuple[Encoding, ...] = (*[Windowed(RoPE(base=50_000.0, interleaved=True), 4096)] * 3, NoPE())
"""RNoPE-SWA (Yang et al. 2025, arXiv 2501.18795) as in Command R7B: three RoPE layers with a window of 4,096 tokens,
then one that sees all, without positions. The base is Command R7B's."""

SWAN_GPT: tuple[Encoding, ...] = (NoPE(), *[Windowed(RoPE(), 512)] * 3)
"""SWAN-GPT (Puvvada et al. 2025, arXiv 2504.08719): one layer that sees all, without positions, and comes first, then
three RoPE layers with a window of 512 tokens.

Past the training length its NoPE layers take `SwanScale`; it is not trained with, so it is not in here."""

SCHEDULES: Mapping[str, tuple[Encoding, ...]] = MappingProxyType(
    {"smollm3": SMOLLM3, "llama4": LLAMA4, "rnope_swa": RNOPE_SWA, "swan_gpt": SWAN_GPT}
)
"""Every schedule over layers that a name stands for: the encodings of one period, the first layer's first.

They repeat over the layers. Another window, chunk or base is a tuple of one's own:
`(*[Windowed(RoPE(), 128)] * 3, NoPE())`.
"""
