"""A published model: what it is, before any weight is read, and the decoder with its weights."""

import abc
import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from nope_jax.config import Config, DataConfig, ModelConfig
from nope_jax.data.tokenizers import Tokenizer, load_tokenizer
from nope_jax.interop.families import Family
from nope_jax.interop.parameters import fill, published_tensors
from nope_jax.interop.weights import Weight
from nope_jax.models import Decoder

Dtype = Literal["float32", "bfloat16"]


class PublishedModel(abc.ABC):
    """A published model in a file or folder, of which only the settings have been read.

    `config` has all that a run's config.json has, so that a published model can stand where a workdir does:
    `model.train_length` is the length it was published for, `data.tokenizer` where its tokenizer lies, and `data.bos`
    whether its sequences start with a beginning-of-sequence token.
    """

    path: Path
    """The folder or the file."""
    family: Family

    @functools.cached_property
    @abc.abstractmethod
    def config(self) -> Config:
        """The model as a config, with dtype float32."""

    @functools.cached_property
    @abc.abstractmethod
    def identity(self) -> str:
        """A digest of settings, tensors' shapes, and sizes and times of the files: it changes if the model does."""

    @abc.abstractmethod
    def _tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name, after checking that the files are whole."""

    @abc.abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """A tensor."""

    @property
    @abc.abstractmethod
    def _weights(self) -> tuple[Weight, ...]:
        """The family's table, in the names of this format."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None if there is none beside the weights.

        Raises:
            ValueError: it cannot be read, or has more tokens than the embedding has rows.
        """
        if not self._has_tokenizer:
            return None
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        if tokenizer.vocab_size > self.config.model.num_tokens:
            raise ValueError(
                f"{self.path}: its tokenizer has {tokenizer.vocab_size} tokens, but its embedding "
                f"{self.config.model.vocab_size} rows"
            )
        return tokenizer

    @property
    @abc.abstractmethod
    def _has_tokenizer(self) -> bool: ...

    def load(self, mesh: Mesh | None = None, dtype: Dtype = "float32") -> Decoder:
        """Load the decoder, tensor by tensor, straight onto the devices.

        Args:
            mesh: Devices to shard the parameters over; None puts them all on the first device of this process.
            dtype: Of parameters and computation.

        Raises:
            ValueError: tensors are missing, unknown, of another shape or dtype, or the files are truncated. Nothing has
                been read then.
        """
        config = dataclasses.replace(self.config.model, dtype=dtype)
        expected = published_tensors(config, self._weights)
        found = self._tensors()
        copies = self._copies_of_the_embedding(found, config)
        missing = [tensor.name for tensor in expected if tensor.name not in found]
        extra = sorted(found.keys() - {tensor.name for tensor in expected} - copies)
        for what, names in (("has no tensor", missing), ("has tensors that its config does not account for:", extra)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(f"{self.path} {what} {', '.join(names[:3])}{more}")
        for tensor in expected:
            if found[tensor.name] != tensor.shape:
                raise ValueError(
                    f"{self.path}: {tensor.name} has shape {list(found[tensor.name])}, but by its config "
                    f"{list(tensor.shape)}"
                )
        return fill(config, expected, self._read, mesh)

    def _copies_of_the_embedding(self, found: dict[str, Any], config: ModelConfig) -> set[str]:
        """Names of a head that is the embedding, saved a second time.

        Raises:
            ValueError: it is not the same.
        """
        names = {place: weight.name for weight in self._weights for place in weight.places}
        head, embedding = names.get("head"), names.get("embedding")
        if not config.tie_embeddings or head not in found or embedding not in found:
            return set()
        if found[head] != found[embedding] or not np.array_equal(self._read(head), self._read(embedding)):
            raise ValueError(f"{self.path}: {head} is not {embedding}, though its config ties the two")
        return {head}


def default_config(model: ModelConfig, tokenizer: str, bos: bool) -> Config:
    """The config of a published model; the rest of its fields are defaults."""
    assert model.train_length is not None
    return Config(model=model, data=DataConfig(tokenizer=tokenizer, context_length=model.train_length, bos=bos))
