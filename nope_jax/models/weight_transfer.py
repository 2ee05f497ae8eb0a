"""Weights of a trained decoder under another encoding: positions can be dropped, scaled or tempered after training."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from nope_jax.encodings import Encoding, Wrapper
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


def transfer_weights(model: Decoder, source: Decoder) -> None:
    """Give a model the weights of another that differs in its encoding only.

    What an encoding has learned comes along where both have the same kind of encoding, whatever wraps it; elsewhere the
    model keeps its own.

    Args:
        model: The decoder to change.
        source: The decoder whose weights it takes.

    Raises:
        ValueError: The two differ in more than their encoding, or in the shape of what an encoding has learned.
    """
    for name in _MUST_AGREE:
        ours, theirs = getattr(model.config, name), getattr(source.config, name)
        if ours != theirs:
            raise ValueError(f"its model.{name} is {theirs}, not {ours}")
    given, taken = (dict(nnx.to_flat_state(nnx.state(decoder))) for decoder in (source, model))

    def shared(path: tuple) -> Array | None:
        """What the source's layers share of the same kind of encoding."""
        _, index, *name = path
        ours = _kind(model.base_encodings[index])
        for theirs in sorted(
            range(len(source.base_encodings)), key=lambda n: source.base_encodings[n] != model.base_encodings[index]
        ):
            if _kind(source.base_encodings[theirs]) is ours and ("positions", theirs, *name) in given:
                return given["positions", theirs, *name][...]
        return None

    def stacked(path: tuple) -> Array | None:
        """What the source's layers have, in the order of the model's layers at one place of its period."""
        _, slot, *name = path
        encoding, rows = model.encodings[slot], []
        for layer in range(slot, model.config.num_layers, len(model.encodings)):
            place, row = layer % len(source.encodings), layer // len(source.encodings)
            if "position" in name:
                ours, theirs = _learned(taken, slot), _learned(given, place)
                alike = _kind(source.encodings[place].unwrapped) is _kind(encoding.unwrapped)
                if not alike or not (ours <= theirs or theirs <= ours) or name[-1] not in theirs:
                    return None
            rows.append(given["blocks", place, *name][row])
        return jnp.stack(rows)

    transferred = []
    for path, variable in taken.items():
        match path[0]:
            case "positions":
                new = shared(path)
            case "blocks":
                new = stacked(path)
            case _:
                new = given[path][...]
        if new is None:
            continue
        if new.shape != variable.shape:
            raise ValueError(f"its {'.'.join(map(str, path))} has shape {list(new.shape)}, not {list(variable.shape)}")
        transferred.append((path, variable.replace(new)))
    nnx.update(model, nnx.from_flat_state(transferred))


def _kind(encoding: Encoding) -> type:
    """What an encoding is, whatever wraps it."""
    return _kind(encoding.encoding.unwrapped) if isinstance(encoding, Wrapper) else type(encoding)


def _learned(params: dict, slot: int) -> set[str]:
    """The names of what the encoding of a place in the period has learned for each layer."""
    return {path[-1] for path in params if path[:2] == ("blocks", slot) and "position" in path}
