"""One update, and one validation loss: pure functions of the state and a batch.

B batch, T length, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nope_jax.data import Batch
from nope_jax.models import Decoder
from nope_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def total_nll(
    graphdef: nnx.GraphDef[Decoder], params: nnx.State, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """The negative log-likelihood of the targets, summed over the batch: nats, float32. `key` as `Decoder`'s."""
    tokens, targets, positions, segment_ids = jax.tree.map(jnp.asarray, batch)
    logits = nnx.merge(graphdef, params)(tokens, positions=positions, segment_ids=segment_ids, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    key: jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer update on the mean negative log-likelihood per token.

    Args:
        batch: arrays [B, T], with B a multiple of `accumulation`.
        accumulation: microbatches that the batch is taken in, one after another; the update is that of the whole.
        key: what random encodings draw from.

    Returns:
        The new state, with `loss` (nats per token) and `grad_norm` (global, unclipped) of the state given, and
        `param_norm` (global) of the new one. If all three are finite, so is the new state.
    """
    value_and_grad = jax.value_and_grad(lambda params, rows: total_nll(graphdef, params, rows, key))
    if accumulation == 1:
        total, grads = value_and_grad(state.params, batch)
    else:
        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
        (total, grads), _ = jax.lax.scan(
            lambda sums, rows: (jax.tree.map(jnp.add, sums, value_and_grad(state.params, rows)), None),
            zeros,
            jax.tree.map(lambda array: _microbatches(array, accumulation), batch),
        )
    loss, grads = jax.tree.map(lambda x: x / batch.targets.size, (total, grads))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return TrainState(params, opt_state), metrics


def _microbatches(array: jax.Array, count: int) -> jax.Array:
    # Microbatch i is rows i, i + count, ...: every device then takes part in each with rows that it already holds.
    return array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)


def jit_train_step(
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    accumulation: int = 1,
    seed: int = 0,
) -> jax.stages.Wrapped:
    """`train_step` jitted for the shardings of `abstract`; the state it is given is donated to the one it returns.

    Random encodings draw from `seed` and the number of steps taken, so that a resumed run draws as one never stopped.
    """
    shardings = jax.tree.map(lambda array: array.sharding, abstract)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (_, steps_taken), *_ = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
        key = jax.random.fold_in(jax.random.key(seed), steps_taken)
        return train_step(state, batch, graphdef=graphdef, optimizer=optimizer, accumulation=accumulation, key=key)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
