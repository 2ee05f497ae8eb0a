"""Weights of a trained decoder under another encoding: positions can be dropped, scaled or tempered after training."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from nope_jax.models.decoder import Decoder

_MUST_AGREE = (
    "vocab_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "model_dim",
    "mlp_dim",
    "mlp",
    "tie_embeddings",
)


def adopt_weights(model: Decoder, donor: Decoder) -> None:
    """Give a model the weights of another that differs in its encoding only.

    What an encoding has learned comes along where both have the same kind of encoding, whatever wraps it; elsewhere the
    model keeps its own.

    Args:
        model: The decoder to change.
        donor: The decoder whose weights it takes.

    Raises:
        ValueError: The two differ in more than their encoding, or in the shape of what an encoding has learned.
    """
    for name in _MUST_AGREE:
        ours, theirs = getattr(model.config, name), getattr(donor.config, name)
        if ours != theirs:
            raise ValueError(f"its model.{name} is {theirs}, not {ours}")
    given = dict(nnx.to_flat_state(nnx.state(donor)))

    def value(path: tuple) -> Array | None:
        """What the donor has for one of the model's parameters; None when that is the model's own affair."""
        if path[0] == "positions":
            kinds = [type(core) for core in donor.cores]
            kind = type(model.cores[path[1]])
            return given["positions", kinds.index(kind), *path[2:]][...] if kind in kinds else None
        if path[0] != "blocks":
            return given[path][...]
        period, periods = len(model.encodings), len(donor.encodings)
        layers = []
        for layer in range(path[1], model.config.num_layers, period):
            place, row = layer % periods, layer // periods
            same = type(donor.encodings[place].core) is type(model.encodings[path[1]].core)
            source = ("blocks", place, *path[2:])
            if "position" in path and not (same and source in given):
                return None
            layers.append(given[source][row])
        return jnp.stack(layers)

    adopted = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        new = value(path)
        if new is None:
            continue
        if new.shape != variable.shape:
            raise ValueError(f"its {'.'.join(map(str, path))} has shape {list(new.shape)}, not {list(variable.shape)}")
        adopted.append((path, variable.replace(new)))
    nnx.update(model, nnx.from_flat_state(adopted))
