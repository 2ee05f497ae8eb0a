"""Corpora: the tokenized documents of a source."""

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
from nope_jax.data.tasks import find_task
from nope_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

LARGE = 2**30
"""Bytes of text above which a split is not tokenized at the start of a run but has to be prepared by `prepare.py`."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The tokenized documents of one split: `corpus[i]` is document i as a model reads it."""

    tokens: Integer[np.ndarray, "tokens"]
    """All documents in sequence, each followed by the separator, in the smallest unsigned dtype."""
    offsets: Integer[np.ndarray, "boundaries"]
    """The start of each document in `tokens`, and the end of the last."""
    byte_lengths: Callable[[int], Integer[np.ndarray, "length"]] | None = None
    """The number of text bytes of each token of a document; None if the documents were not made from text.

    Tokens other than bytes are looked up in the text, with an OSError if the text is missing, as it may be."""
    bos: int | None = None
    """The token that starts each sequence (`data.bos`). It is not in `tokens` and has no bytes."""
    answers: Integer[np.ndarray, "documents"] | None = None
    """Index in each document of the first token of its answer: training is on these tokens, in whole documents.

    None: training is on all tokens, in windows over documents."""
    digest_file: Path | None = None
    """File that caches the digest; None: no cache."""

    def digest(self) -> str:
        """`digest_of` these documents; a resumed run checks it."""
        if self.digest_file is not None and self.digest_file.exists():
            return self.digest_file.read_text().strip()
        offsets = self.offsets if self.answers is None else np.concatenate([self.offsets, self.answers])
        digest = digest_of(self.tokens, offsets)
        if self.digest_file is not None:
            unfinished = self.digest_file.with_suffix(f".{uuid.uuid4().hex}")
            with contextlib.suppress(OSError):  # the folder may belong to another user and be read-only
                unfinished.write_text(digest + "\n")
                unfinished.replace(self.digest_file)
        return digest

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Integer[np.ndarray, "length"]:
        return self.read(index, 0, int(self.lengths[index]))

    def read(self, index: int, start: int, stop: int) -> Integer[np.ndarray, "length"]:
        """Return `corpus[index][start:stop]` as a model reads it: a bos, if there is one, replaces the first token."""
        first = self.offsets[index]
        if self.bos is None:
            return self.tokens[first + start : first + stop].astype(np.int32)
        return np.insert(self.tokens[first + start : first + stop - 1].astype(np.int32), 0, self.bos)

    @property
    def lengths(self) -> Integer[np.ndarray, "documents"]:
        """Number of tokens of each document, including its bos if there is one, excluding its separator."""
        return np.diff(self.offsets) - (self.bos is None)


def load_corpus(config: DataConfig, split: Split) -> Corpus:
    """Load one split of `data.source` as tokens of `data.tokenizer`.

    `python_stdlib`: the standard library of the running Python, prepared into `data.dir` on first use.
    `text:PATH_OR_GLOB`: files, one document each; a folder stands for all files under it that are not hidden. The split
    is decided by file names relative to the folder (or to the part of the glob before its first wildcard). With
    `data.document_separator` a file contains many documents, and the split is decided by their text. Each split has at
    least one document; a single document is cut, and its last tenth is the validation split. Documents with the same
    text are kept once, so none is in both splits. Compressed files (gzip, bzip2, xz) are decompressed; binary files are
    skipped, except a single file given by its path when the tokens are bytes.
    `tfds:NAME`: a dataset with a feature `text` (or PG-19's `book_text`), stored in `data.dir` as ArrayRecord; NAME is
    `name`, `name/config` or `name/config:version`. Without a `validation` split, the last tenth of `train` is used.
    `task:NAME`: a task of `nope_jax.data.tasks`, generated from `data.seed`; each document is an example. For scan and
    pcfg, `task:NAME:PATH` reads a prepared dataset instead. The validation split has instances held out of training.

    Bytes are held in memory. Other tokens, and those of a split larger than LARGE, are memory-mapped from a file under
    `data.dir`. It is written on first use, or, for a split larger than LARGE, by `prepare.py` only.

    Raises:
        ValueError: the source does not exist or cannot be read as asked, or it is large and not prepared.
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
        texts = documents.read([index])  # a generator, which closes the file when it is collected
        return np.concatenate([*of_bos, *(encoded.byte_lengths for encoded in tokenizer.encode_pieces(next(texts)))])

    if not offsets_file.exists():
        if documents.num_bytes > LARGE:
            raise ValueError(
                f"data.source {config.source} has {documents.num_bytes / 1e9:.1f} GB of text in its {split} split, too "
                f"much to tokenize at the start of a run, and is not prepared in data.dir {data_dir(config)} for "
                f"data.tokenizer {config.tokenizer}: run prepare.py with this config once"
            )
        if isinstance(tokenizer, ByteTokenizer):
            buffer = io.BytesIO()
            offsets = tokenize(documents, range(documents.size), config, buffer).offsets
            return Corpus(np.frombuffer(buffer.getbuffer(), np.uint8), offsets, byte_lengths, bos)
        prepare_split(config, split, workers=1)
    offsets = np.load(offsets_file)
    tokens = np.memmap(tokens_file, token_dtype(tokenizer), mode="r")
    return Corpus(tokens, offsets, byte_lengths, bos, digest_file=digest_file)


def _bos(config: DataConfig, tokenizer: Tokenizer) -> int | None:
    return tokenizer.bos if config.bos else None


def _task_corpus(config: DataConfig, split: Split) -> Corpus:
    tokenizer = load_tokenizer(config.tokenizer)
    tokens, offsets, answers = find_task(config.source.removeprefix("task:")).documents(tokenizer, config, split)
    return Corpus(tokens, offsets, bos=_bos(config, tokenizer), answers=answers)
