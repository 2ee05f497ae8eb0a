"""The decoder: embedding, layers stacked on a leading axis and scanned, head.

Shapes: B batch, T length, L layers, N query heads, D model width, V vocabulary; P the encodings' period.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.attention import AttentionStats
from nope_jax.config import Config, ModelConfig
from nope_jax.encodings import Sizes, resolve
from nope_jax.models.layers import Block, encoding_params, kernel, rms_norm


class Decoder(nnx.Module):
    """A pre-norm causal transformer whose way of knowing positions is its config's `encoding`.

    Args:
        config: The shape of the model.
        rngs: Keys for the initial parameters.

    Raises:
        ValueError: An unknown encoding, more encodings than layers, or heads that do not divide.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        Config(model=config)  # refuses what cannot be
        self.config = config
        self.encodings = resolve(config.encoding)
        period = len(self.encodings)
        sizes = Sizes(
            num_heads=config.num_heads,
            head_dim=config.head_dim or config.model_dim // config.num_heads,
            model_dim=config.model_dim,
            train_length=config.train_length,
        )
        limits = [limit for encoding in self.encodings if (limit := encoding.max_length(sizes)) is not None]
        self.max_length = min(limits, default=None)

        embedding = jax.nn.initializers.normal(config.model_dim**-0.5)
        self.embedding = nnx.Param(
            embedding(rngs.params(), (config.vocab_size, config.model_dim), jnp.float32), axes=("vocab", "embed")
        )
        distinct = dict.fromkeys(self.encodings)
        self.positions = nnx.List([encoding_params(e.init_shared(rngs.params(), sizes)) for e in distinct])

        def stack(slot: int) -> Block:
            """All layers of one place in the period, their parameters stacked on a leading axis."""
            count = len(range(slot, config.num_layers, period))

            @nnx.split_rngs(splits=count)
            @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
            def blocks(rngs: nnx.Rngs) -> Block:
                return Block(config, self.encodings[slot], sizes, rngs=rngs)

            return blocks(rngs)

        self.blocks = nnx.List([stack(slot) for slot in range(period)])
        self.norm = nnx.Param(jnp.ones(config.model_dim))
        shape = (config.model_dim, config.vocab_size)
        self.head = None if config.tie_embeddings else kernel(rngs, shape, ("embed", "vocab"), inputs=shape[0])

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        temperature: Any = None,
        return_stats: bool = False,
    ) -> Any:
        """Logits of the next token at every position.

        Args:
            tokens: Token ids below V; one outside gives NaN where jit hides it from the check.
            positions: Where the tokens stand; None for 0..T-1.
            segment_ids: Tokens attend only within their segment.
            temperature: Factor of every content logit, beside the encoding's own: a number, [N], [L, N] or
                [B or 1, N or 1, T].
            return_stats: Also return entropy and logsumexp, [L, B, N, T] each.

        Returns:
            Logits [B, T, V] in float32, or a pair (logits, AttentionStats).

        Raises:
            ValueError: Tokens outside the vocabulary, positions the encoding does not have, or a shape that cannot be.
        """
        hidden, stats = self.hidden(
            tokens, positions=positions, segment_ids=segment_ids, temperature=temperature, return_stats=return_stats
        )
        logits = self.logits(hidden)
        return (logits, stats) if return_stats else logits

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Any = None,
        segment_ids: Any = None,
        temperature: Any = None,
        return_stats: bool = False,
    ) -> tuple[Shaped[Array, "B T D"], AttentionStats | None]:
        """What the head reads: the normed output of the last layer; and the statistics. Args as `__call__`."""
        self._check_tokens(tokens, positions)
        config = self.config
        distinct = dict.fromkeys(self.encodings)
        shared = {e: {k: p[...] for k, p in params.items()} for e, params in zip(distinct, self.positions, strict=True)}

        rows = self.embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = (rows * config.model_dim**0.5).astype(config.dtype)  # the scale of a sinusoid, as in Vaswani et al. 2017
        where = jnp.arange(tokens.shape[1])[None] if positions is None else jnp.atleast_2d(positions)
        for encoding, params in shared.items():
            x = encoding.input(params, x, where)

        structures, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

        def layer(x, slot: int, state, temperature):
            block = nnx.merge(structures[slot], state)
            return block(
                x,
                shared[self.encodings[slot]],
                query_positions=positions,
                key_positions=positions,
                segment_ids=segment_ids,
                temperature=temperature,
                return_stats=return_stats,
            )

        if config.remat:
            layer = jax.checkpoint(layer, static_argnums=1)

        def period(x, layers):
            stats = []
            for slot, (state, temperature) in enumerate(layers):
                x, s = layer(x, slot, state, temperature)
                stats.append(s)
            return x, stats

        slots, whole = len(states), config.num_layers // len(states)
        per_layer = _per_layer(temperature, config.num_layers)
        layers = [(state, per_layer[slot::slots]) for slot, state in enumerate(states)]
        x, stats = jax.lax.scan(period, x, jax.tree.map(lambda a: a[:whole], layers))
        x, rest = period(x, jax.tree.map(lambda a: a[whole], layers[: config.num_layers % slots]))

        x = rms_norm(x, self.norm[...])
        if not return_stats:
            return x, None
        # From [periods, ...] per slot to one axis of layers in their order, then those of an unfinished last period.
        stats = jax.tree.map(lambda *s: jnp.stack(s, axis=1).reshape(-1, *s[0].shape[1:]), *stats)
        return x, jax.tree.map(lambda *s: jnp.concatenate([s[0], *(r[None] for r in s[1:])]), stats, *rest)

    def logits(self, hidden: Shaped[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head: logits in float32."""
        weights = self.embedding[...].T if self.head is None else self.head[...]
        return jnp.einsum("btd,dv->btv", hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def _check_tokens(self, tokens, positions) -> None:
        """Refuse what can be seen to be wrong; values under jit cannot."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape [batch, length], not {list(tokens.shape)}")
        seen = _values(tokens)
        if seen is not None and seen.size and (seen.min() < 0 or seen.max() >= self.config.vocab_size):
            bad = seen.min() if seen.min() < 0 else seen.max()
            raise ValueError(f"tokens must be between 0 and {self.config.vocab_size - 1} (vocab_size), not {bad}")
        if self.max_length is None:
            return
        where = np.arange(tokens.shape[1]) if positions is None else _values(positions)
        if where is not None and where.size and (where.min() < 0 or where.max() >= self.max_length):
            bad = where.min() if where.min() < 0 else where.max()
            encoding = self.config.encoding
            raise ValueError(
                f"positions must be between 0 and {self.max_length - 1}, all that {encoding!r} has, not {bad}"
            )


def _values(x: Any) -> np.ndarray | None:
    """What an array holds, where that can be seen: not under jit, nor on other hosts."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def _per_layer(temperature: Any, num_layers: int) -> Array:
    """A temperature as one entry per layer."""
    temperature = jnp.asarray(1.0 if temperature is None else temperature, jnp.float32)
    if temperature.ndim == 2:
        if temperature.shape[0] != num_layers:
            raise ValueError(f"temperature [L, N] must have L = {num_layers} rows, not {temperature.shape[0]}")
        return temperature
    return jnp.broadcast_to(temperature, (num_layers, *temperature.shape))
