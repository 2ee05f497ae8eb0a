"""Transfer of a trained decoder's weights to another encoding, to drop or scale positions after training."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from nope_jax.config import ModelConfig
from nope_jax.encodings import Encoding, Wrapper
from nope_jax.models.decoder import Decoder

_MAY_DIFFER = {"encoding", "train_length", "attention", "dtype", "remat"}
"""Fields of ModelConfig: the encoding, and how the computation is done. All others must agree."""


def transfer_weights(model: Decoder, source: Decoder) -> None:
    """Give a model the weights of another model that differs only in its encoding.

    Learned parameters of an encoding are transferred if both models have the same kind of encoding, under any wrappers;
    otherwise the model keeps its own.

    Args:
        model: The decoder to change.
        source: The decoder to take the weights from.

    Raises:
        ValueError: The two differ in more than their encoding, or in the shapes of the encoding's parameters.
    """
    # A default is the same as its value written out; if it follows another field, that one is what differs.
    both = [decoder.config.with_defaults() for decoder in (model, source)]
    for name in (field.name for field in dataclasses.fields(ModelConfig) if field.name not in _MAY_DIFFER):
        ours, theirs = (getattr(config, name) for config in both)
        if ours != theirs and getattr(model.config, name) != getattr(source.config, name):
            raise ValueError(f"its model.{name} is {theirs}, not {ours}")
    given, taken = (dict(nnx.to_flat_state(nnx.state(decoder))) for decoder in (source, model))

    def shared(path: tuple) -> Array | None:
        """The shared parameter of the source's encoding of the same kind."""
        _, index, *name = path
        ours = _kind(model.base_encodings[index])
        for theirs in sorted(
            range(len(source.base_encodings)), key=lambda n: source.base_encodings[n] != model.base_encodings[index]
        ):
            if _kind(source.base_encodings[theirs]) is ours and ("positions", theirs, *name) in given:
                return given["positions", theirs, *name][...]
        return None

    def stacked(path: tuple) -> Array | None:
        """The layer parameter of the source, for the model's layers at one place of its period, in order."""
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
    """The class of an encoding without its wrappers."""
    return _kind(encoding.encoding.unwrapped) if isinstance(encoding, Wrapper) else type(encoding)


def _learned(params: dict, slot: int) -> set[str]:
    """Names of the learned layer parameters of the encoding at one place of the period."""
    return {path[-1] for path in params if path[:2] == ("blocks", slot) and "position" in path}
