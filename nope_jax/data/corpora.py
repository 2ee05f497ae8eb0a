"""Corpora: the documents of a source as tokens."""

import contextlib
import dataclasses
import io
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split
from nope_jax.data.prepare import digest_file_of, digest_of, prepare_split, say_once, token_dtype, token_files, tokenize
from nope_jax.data.sources import data_dir, find_documents
from nope_jax.data.tasks import task_documents
from nope_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

LARGE = 2**30
"""Bytes of text from which on a split is not tokenised at the start of a run: `prepare.py` does it once."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of one split as tokens: `corpus[i]` is those that a model reads of document i."""

    tokens: Integer[np.ndarray, "tokens"]
    """All documents one after another, each followed by the separator, in the smallest unsigned type."""
    offsets: Integer[np.ndarray, "boundaries"]
    """Where in `tokens` each document starts, and the end of the last."""
    byte_lengths: Callable[[int], Integer[np.ndarray, "length"]] | None = None
    """The bytes of text that belong to each token of a document; None where the documents were not made from text.

    Tokens other than bytes have to be looked up in the text: an OSError where that is not there, as it need not be."""
    bos: int | None = None
    """The token that begins what a model reads (`data.bos`). It is not among `tokens`, and has no bytes."""
    digest_file: Path | None = None
    """Where the digest is kept once it is known; None: nowhere."""

    def digest(self) -> str:
        """`digest_of` these documents, which is what a run is held to."""
        if self.digest_file is not None and self.digest_file.exists():
            return self.digest_file.read_text().strip()
        digest = digest_of(self.tokens, self.offsets)
        if self.digest_file is not None:
            unfinished = self.digest_file.with_suffix(f".{uuid.uuid4().hex}")
            with contextlib.suppress(OSError):  # what others have prepared need not be ours to write to
                unfinished.write_text(digest + "\n")
                unfinished.replace(self.digest_file)
        return digest

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Integer[np.ndarray, "length"]:
        return self.read(index, 0, int(self.lengths[index]))

    def read(self, index: int, start: int, stop: int) -> Integer[np.ndarray, "length"]:
        """What a model reads of `corpus[index][start:stop]`: where there is a bos, it takes the place of the first."""
        first = self.offsets[index]
        if self.bos is None:
            return self.tokens[first + start : first + stop].astype(np.int32)
        return np.insert(self.tokens[first + start : first + stop - 1].astype(np.int32), 0, self.bos)

    @property
    def lengths(self) -> Integer[np.ndarray, "documents"]:
        """Tokens of each document: with its bos if there is one, without its separator."""
        return np.diff(self.offsets) - (self.bos is None)


def load_corpus(config: DataConfig, split: Split) -> Corpus:
    """The documents of one split of `data.source`, as tokens of `data.tokenizer`.

    `python_stdlib`: the standard library of the running Python, prepared into `data.dir` the first time.
    `text:PATH_OR_GLOB`: files, one document each; a folder stands for all files under it that are not hidden. Which are
    validation is decided by their names under the folder (or the part of the glob before its first wildcard). With
    `data.document_separator` a document is what lies between two of it, and its own text decides. At least one document
    is on either side; a single one is cut in two: its last tenth is the validation document. Of documents with the same
    text one is kept, so that none is on both sides. Files that are compressed (gzip, bzip2, xz) are read decompressed;
    binary ones are left out, unless the path is that of a single one and the tokens are bytes.
    `tfds:NAME`: a dataset with a feature `text` (or PG-19's `book_text`) that lies in `data.dir` as ArrayRecord; NAME
    is `name`, `name/config` or `name/config:version`. Where it has no split `validation`, that is the last tenth of
    `train`.
    `task:NAME`: a task of `nope_jax.data.tasks`, made from `data.seed`: passkey. Each document, with its separator, has
    `data.context_length` tokens, so that every window begins with one.

    Bytes are held in memory. Other tokens, and those of a split larger than LARGE, are read from a file under
    `data.dir` as they are needed, which is written the first time; that of a larger one by `prepare.py` alone.

    Raises:
        ValueError: no such source, one that cannot be read as asked, or a large one that is not prepared.
    """
    if config.source.startswith("task:"):
        return _task_corpus(config, split)
    documents = find_documents(config, split)
    tokenizer = load_tokenizer(config.tokenizer)
    tokens_file, offsets_file = token_files(config, documents)
    bos = _bos(config, tokenizer)
    for note in documents.notes:
        say_once(note)
    digest_file = digest_file_of(tokens_file)

    def byte_lengths(index: int) -> Integer[np.ndarray, "length"]:
        of_bos = [] if bos is None else [np.zeros(1, np.int64)]
        if isinstance(tokenizer, ByteTokenizer):
            return np.concatenate([*of_bos, np.ones(offsets[index + 1] - offsets[index] - 1, np.int64)])
        texts = documents.read([index])  # closes the file when it is gone
        return np.concatenate([*of_bos, *(encoded.byte_lengths for encoded in tokenizer.encode_pieces(next(texts)))])

    if not offsets_file.exists():
        if documents.num_bytes > LARGE:
            raise ValueError(
                f"data.source {config.source} has {documents.num_bytes / 1e9:.1f} GB of text in its {split} split, too "
                f"many to tokenise at the start of a run, and is not prepared in data.dir {data_dir(config)} for "
                f"data.tokenizer {config.tokenizer}: run prepare.py with this config once"
            )
        if isinstance(tokenizer, ByteTokenizer):
            buffer = io.BytesIO()
            offsets = tokenize(documents, range(documents.size), config, buffer).offsets
            return Corpus(np.frombuffer(buffer.getbuffer(), np.uint8), offsets, byte_lengths, bos)
        prepare_split(config, split, workers=1)
    offsets = np.load(offsets_file)
    return Corpus(np.memmap(tokens_file, token_dtype(tokenizer), mode="r"), offsets, byte_lengths, bos, digest_file)


def _bos(config: DataConfig, tokenizer: Tokenizer) -> int | None:
    return tokenizer.bos if config.bos else None


def _task_corpus(config: DataConfig, split: Split) -> Corpus:
    name = config.source.removeprefix("task:")
    tokenizer, length = load_tokenizer(config.tokenizer), config.context_length
    documents = task_documents(name, split, tokenizer, length - 1, config.seed)
    tokens = np.insert(documents, length - 1, tokenizer.separator, axis=1)
    return Corpus(tokens.reshape(-1), length * np.arange(len(documents) + 1), bos=_bos(config, tokenizer))
