"""AdamW with linear warm-up and cosine decay to a tenth, and which parameters it decays."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nope_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of the update after `count` updates: up linearly, then along a cosine to a tenth at `steps`.

    The first update already moves (its rate is peak / warmup_steps), and a run shorter than its warm-up ends within it.
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warmup = (count + 1) / max(1, config.warmup_steps)
        progress = (count - config.warmup_steps) / max(1, steps - config.warmup_steps)
        cosine = 0.55 + 0.45 * jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))
        return config.learning_rate * jnp.minimum(warmup, cosine)

    return schedule


def decays(params: nnx.State) -> nnx.State:
    """True for the matrices that read or write the residual stream, False for norms and an encoding's own parameters.

    Such a matrix is one whose logical axes hold "embed" beside another; "layers" only stacks.
    """

    def decay(variable: nnx.Variable) -> nnx.Variable:
        names = set(variable.get_metadata("axes", None) or ()) - {"layers", None}
        return jax.tree.map(lambda _: "embed" in names and len(names) > 1, variable)

    return jax.tree.map(decay, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW over `steps` updates."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
