"""Corpora: the tokenized documents of a source."""

import contextlib
import dataclasses
import hashlib
import io
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split
from nope_jax.data.prepare import digest_file_of, digest_of, prepare_split, say_once, token_dtype, token_files, tokenize
from nope_jax.data.sources import check_apart, data_dir, find_documents, is_task, members, source_of
from nope_jax.data.tasks import find_task
from nope_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from nope_jax.paths import size_of_bytes

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
        digest = digest_of([np.ascontiguousarray(self.tokens).data], offsets)
        if self.digest_file is not None:
            unfinished = self.digest_file.with_suffix(f".{uuid.uuid4().hex}")
            with contextlib.suppress(OSError):  # the folder may belong to another user and be read-only
                unfinished.write_text(digest + "\n")
                unfinished.replace(self.digest_file)
        return digest

    @property
    def members(self) -> tuple["Corpus", ...]:
        """The corpora of single sources that this consists of: itself."""
        return (self,)

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


class Mixture:
    """The documents of several corpora, one corpus after the other. `data.batches` mixes their rows."""

    def __init__(self, members: Sequence[Corpus]):
        self.members = tuple(members)
        self.bos = members[0].bos
        self.lengths = np.concatenate([member.lengths for member in members])
        self._firsts = np.cumsum([0, *map(len, members)])

    def digest(self) -> str:
        return hashlib.sha256("".join(member.digest() for member in self.members).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Integer[np.ndarray, "length"]:
        member, index = self._find(index)
        return member[index]

    def read(self, index: int, start: int, stop: int) -> Integer[np.ndarray, "length"]:
        """As `Corpus.read`."""
        member, index = self._find(index)
        return member.read(index, start, stop)

    @property
    def byte_lengths(self) -> Callable[[int], Integer[np.ndarray, "length"]] | None:
        """As `Corpus.byte_lengths`; None if a member has none."""
        return None if any(member.byte_lengths is None for member in self.members) else self._byte_lengths

    def _byte_lengths(self, index: int) -> Integer[np.ndarray, "length"]:
        member, index = self._find(index)
        assert member.byte_lengths is not None
        return member.byte_lengths(index)

    def _find(self, index: int) -> tuple[Corpus, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.members[number], index - int(self._firsts[number])


def load_corpus(config: DataConfig, split: Split) -> Corpus | Mixture:
    """Load one split of `data.source` as tokens of `data.tokenizer`; of several sources, all documents.

    `python_stdlib`: the standard library of the running Python, prepared into `data.dir` on first use.
    `text:PATH_OR_GLOB`: files, one document each; a folder stands for all files under it that are not hidden. The split
    is decided by file names relative to the folder (or to the part of the glob before its first wildcard). With
    `data.document_separator` a file contains many documents, and the split is decided by their text. A single document
    is cut, and its end is the validation split. Binary files are skipped, except a single file given by its path when
    the tokens are bytes.
    `jsonl:PATH_OR_GLOB`: files of JSON lines, whose field `data.text_field` is a document.
    `parquet:PATH_OR_GLOB`: Parquet files, whose column `data.text_field` holds documents.
    `hf:NAME_OR_FOLDER`: a dataset of Hugging Face `datasets`, whose column `data.text_field` holds documents.
    `tfds:NAME`: a dataset with a feature `data.text_field` (or PG-19's `book_text`), stored in `data.dir` as
    ArrayRecord; NAME is `name`, `name/config` or `name/config:version`.
    `task:NAME`: a task of `nope_jax.data.tasks`, generated from `data.seed`; each document is an example. For scan and
    pcfg, `task:NAME:PATH` reads a prepared dataset instead. The validation split has instances held out of training.

    The validation split is `data.validation_source`, or else the dataset's own, or else a tenth of the documents
    (`data.split`), decided by their text. Each split has at least one document. Except for tfds, documents with the
    same text are kept once, so none is in both splits. Compressed files (gzip, bzip2, xz, Zstandard) are decompressed.

    Bytes are held in memory. Other tokens, and those of a split larger than LARGE, are memory-mapped from a file under
    `data.dir`. It is written on first use, or, for a split larger than LARGE, by `prepare.py` only.

    Raises:
        ValueError: a source does not exist or cannot be read as asked, or it is large and not prepared; or a document
            of the validation split is trained on.
    """
    if split == "train":
        check_apart(config)
    loaded = [
        _task_corpus(member, split) if is_task(member, split) else _load_documents(member, split)
        for member in members(config, split)
    ]
    return loaded[0] if len(loaded) == 1 else Mixture(loaded)


def _load_documents(config: DataConfig, split: Split) -> Corpus:
    documents = find_documents(config, split)
    tokenizer = load_tokenizer(config.tokenizer, config.separator_token)
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
                f"{source_of(config, split)} has {size_of_bytes(documents.num_bytes)} of text in its {split} split, "
                f"too much to tokenize at the start of a run, and is not prepared in data.dir {data_dir(config)} for "
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
    tokenizer = load_tokenizer(config.tokenizer, config.separator_token)
    task = find_task(source_of(config, split).name.removeprefix("task:"))
    tokens, offsets, answers = task.documents(tokenizer, config, split)
    return Corpus(tokens, offsets, bos=_bos(config, tokenizer), answers=answers)
