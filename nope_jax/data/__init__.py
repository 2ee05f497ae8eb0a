"""From documents to batches: document -> tokens -> windows -> the rows of a step."""

from nope_jax.data.batches import Batch, train_batches, validation_batches
from nope_jax.data.corpora import Corpus, Mixture, load_corpus
from nope_jax.data.sources import describe
from nope_jax.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Mixture",
    "Tokenizer",
    "describe",
    "load_corpus",
    "load_tokenizer",
    "train_batches",
    "validation_batches",
]
