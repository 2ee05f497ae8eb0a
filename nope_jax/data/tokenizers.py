"""Tokenizers: text to token ids and back.

Text is tokenized in blocks, to support any size. The tokens near the edges of a block depend on the text beyond it, so
consecutive blocks overlap and are joined in the middle of a stretch where both have the same tokens.
"""

import abc
import codecs
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Integer

from nope_jax.config import Config, override
from nope_jax.data.gguf import read_header
from nope_jax.data.gguf_tokenizer import build_tokenizer

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Tokens that can separate documents; a tokenizer.json does not say which of its tokens does."""
BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
"""Tokens that can start a sequence."""

BLOCK = 2**16
"""Characters tokenized at a time."""

OVERLAPS = (64, 8, 1)
"""Overlaps to try, as fractions 1/n of the preceding block: the next larger one if the blocks' tokens disagree."""

UNDECODABLE = re.compile("[\udc80-\udcff]")
"""A byte of invalid UTF-8, as decoded by the error handler surrogateescape."""


class Encoded(NamedTuple):
    """The tokens of a piece of text."""

    tokens: Integer[np.ndarray, "tokens"]
    byte_lengths: Integer[np.ndarray, "tokens"]
    """Number of text bytes of each token, see `Tokenizer.byte_lengths`."""
    undecodable: int = 0
    """Number of text bytes that were read as U+FFFD."""


@runtime_checkable
class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def separator(self) -> int:
        """The token added after each document when documents are packed."""
        ...

    @property
    def bos(self) -> int:
        """The token that starts a sequence with `data.bos`: the tokenizer's own, or else the separator."""
        ...

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "tokens"]:
        """Tokenize a text without adding special tokens; invalid UTF-8 bytes are read as U+FFFD."""
        ...

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Encoded]:
        """Tokenize a text of any size in bounded memory, given in arbitrary pieces.

        The tokens are those of the whole text if the tokenizer depends only on local context, as word-level tokenizers
        and SentencePiece do. They may differ where BLOCK characters have no stretch to join on, such as one repeated
        letter.
        """
        ...

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> str:
        """Convert tokens to text."""
        ...

    def byte_lengths(self, text: str | bytes) -> Integer[np.ndarray, "tokens"]:
        """Number of text bytes of each token; they sum to the size of the text (in UTF-8, if a str).

        The text is the given one, not the tokenizer's normalized or decoded one. A token owns the bytes from the end of
        the token before it to its own end; if several tokens encode one character, one of them owns all its bytes.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Each byte is a token, so any file can be read, UTF-8 or not. The separator is byte 0, which is rare in text."""

    vocab_size: int = 256
    separator: int = 0
    bos: int = 0

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "tokens"]:
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Encoded]:
        return (Encoded(self.encode(piece), self.byte_lengths(piece)) for piece in pieces)

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> str:
        return np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")

    def byte_lengths(self, text: str | bytes) -> Integer[np.ndarray, "tokens"]:
        return np.broadcast_to(1, len(self.encode(text)))


WORD = re.compile(r" ?\[(?:SEP|NEXT)\]| ?\w+| ?[^\w\s]|\s")


def words(text: str) -> list[str]:
    """Cut a text into words, punctuation marks and [SEP] or [NEXT], each with the space before it, if there is one."""
    return WORD.findall(text)


class _TextTokenizer(abc.ABC):
    """A tokenizer of characters, based on the tokens and end offsets that its library reports."""

    @abc.abstractmethod
    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, and the number of characters up to the end of each."""

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "tokens"]:
        return self._spans(_decoded(text))[0]

    def byte_lengths(self, text: str | bytes) -> Integer[np.ndarray, "tokens"]:
        text = _decoded(text)
        _, ends = self._spans(text)
        ends[-1:] = _size(text)  # the last token owns the end of the text that the tokenizer leaves out
        return np.diff(ends, prepend=0)

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Encoded]:
        blocks = _blocks(pieces, BLOCK)
        before = next(blocks, "")
        tokens, ends = self._spans(before)  # not yielded yet; ends are in bytes from the start of the text
        position, yielded, undecodable = _size(before), 0, len(UNDECODABLE.findall(before))
        for block in blocks:
            for part in OVERLAPS:
                context = before[-max(1, BLOCK // part) :]
                following, following_ends = self._spans(context + block)
                following_ends += position - _size(context)
                if seam := _seam(tokens, ends, following, following_ends):
                    break
            else:
                following, following_ends = self._spans(block)
                following_ends += position
                seam = len(tokens), 0
            tokens = np.concatenate([tokens[: seam[0]], following[seam[1] :]])
            ends = np.maximum.accumulate(np.concatenate([ends[: seam[0]], following_ends[seam[1] :]]))
            # Hold back the last token, which owns the end of the text that the tokenizer leaves out.
            if done := max(0, min(seam[0], len(tokens) - 1)):
                yield Encoded(tokens[:done], np.diff(ends[:done], prepend=yielded), undecodable)
                tokens, yielded, ends, undecodable = tokens[done:], ends[done - 1], ends[done:], 0
            before, position = block, position + _size(block)
            undecodable += len(UNDECODABLE.findall(block))
        ends[-1:] = position
        yield Encoded(tokens, np.diff(ends, prepend=yielded), undecodable)

    def _spans(self, text: str) -> tuple[Integer[np.ndarray, "tokens"], Integer[np.ndarray, "tokens"]]:
        """The tokens of a text, and the number of bytes up to the end of each."""
        tokens, ends = self._encode(UNDECODABLE.sub("\ufffd", text))
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        sizes = 1 + sum(characters >= least for least in (0x80, 0x800, 0x10000))
        sizes = np.where((characters >= 0xDC80) & (characters < 0xDD00), 1, sizes)
        bytes_before = np.append(0, np.cumsum(sizes))
        return np.array(tokens, np.int32), np.maximum.accumulate(bytes_before[np.array(ends, np.int64)])


@dataclasses.dataclass(frozen=True)
class JsonTokenizer(_TextTokenizer):
    """A `tokenizer.json`, read by the tokenizers library."""

    tokenizer: tokenizers.Tokenizer
    vocab_size: int
    separator: int
    bos: int

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> str:
        return self.tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)


class WordTokenizer(_TextTokenizer):
    """Each of `words` is a token: for texts of few words, such as those of a task. Token 0 separates documents."""

    separator = bos = 0

    def __init__(self, name: str, vocabulary: str):
        """Take the name that errors call it by, and a text that has all words."""
        self._name = name
        self.words = ["</s>", *dict.fromkeys([" ", *words(vocabulary)])]
        self.vocab_size = len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "tokens"]:
        try:
            return np.array([self._ids[word] for word in words(_decoded(text))], np.int32)
        except KeyError as error:
            raise ValueError(f"data.tokenizer {self._name} has no word {error.args[0]!r}") from None

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode(text).tolist(), [match.end() for match in WORD.finditer(text)]

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> str:
        return "".join([self.words[token] for token in np.asarray(tokens).tolist()])


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer(_TextTokenizer):
    """A SentencePiece model, read by the sentencepiece library."""

    processor: Any
    vocab_size: int
    separator: int
    bos: int

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self.processor.encode(text, return_type="offset_mapping")
        return encoding["ids"], [end for _, end in encoding["offsets"]]

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> str:
        return self.processor.decode(np.asarray(tokens).tolist())


def _decoded(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode(errors="surrogateescape")


def _size(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))


def _blocks(pieces: Iterable[bytes], size: int) -> Iterator[str]:
    """The characters of a text in blocks of `size`."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    held = ""
    for piece in pieces:
        held += decoder.decode(piece)
        whole = len(held) // size * size
        yield from (held[start : start + size] for start in range(0, whole, size))
        held = held[whole:]
    held += decoder.decode(b"", final=True)
    if held:
        yield held


def _seam(
    tokens: Integer[np.ndarray, "m"],
    ends: Integer[np.ndarray, "m"],
    following: Integer[np.ndarray, "n"],
    following_ends: Integer[np.ndarray, "n"],
) -> tuple[int, int] | None:
    """Find where to join two overlapping token sequences: how many tokens to take of the first and skip of the second.

    That is the middle of the longest stretch in which both have the same tokens at the same offsets; None if it is
    shorter than half of the overlap, or than 8 tokens.
    """
    if not len(tokens) or not len(following):
        return None
    start = int(np.searchsorted(ends, following_ends[0]))
    stop = int(np.searchsorted(following_ends, ends[-1], side="right"))
    first = list(zip(ends[start:].tolist(), tokens[start:].tolist(), strict=True))
    second = list(zip(following_ends[:stop].tolist(), following[:stop].tolist(), strict=True))
    match = difflib.SequenceMatcher(None, first, second, autojunk=False).find_longest_match()
    if match.size < max(8, len(second) // 2):
        return None
    return start + match.a + match.size // 2, match.b + match.size // 2


def load_tokenizer(spec: str, separator: str | None = None) -> Tokenizer:
    """Load the tokenizer given by `data.tokenizer`.

    Args:
        spec: `bytes`, `task:NAME` (the words of a task), or a path: a tokenizer.json (ending in .json), the folder of a
            Hugging Face model, a GGUF file (ending in .gguf), or a SentencePiece model (any other file).
        separator: The token that separates documents (`data.separator_token`); None: the tokenizer's own.

    Raises:
        ValueError: the task or the path does not exist, is not a tokenizer, or has no token that can separate documents
            (SEPARATORS, or the end-of-sentence token of a SentencePiece model); or `separator` is none of its tokens.
    """
    if spec == "bytes":
        if separator is None:
            return ByteTokenizer()
        byte = _known(next(iter(separator.encode()), None) if len(separator.encode()) == 1 else None, separator, spec)
        return ByteTokenizer(separator=byte, bos=byte)
    if spec.startswith("task:"):
        return _load_words(spec, separator)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path, separator)
    if not path.is_file():
        raise ValueError(
            "data.tokenizer must be bytes, task:NAME or the path of a tokenizer.json, a SentencePiece model, a GGUF "
            f"file or the folder of a Hugging Face model; {spec} is no file or folder"
        )
    loaders = {".json": _load_json, ".gguf": _load_gguf}
    return loaders.get(path.suffix, _load_sentencepiece)(path, separator)


def with_vocab_size(config: Config) -> Config:
    """Return a config whose `model.vocab_size` is not None: 256, or the size of the tokenizer if that is larger.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    if config.model.vocab_size is not None:
        return config
    tokens = load_tokenizer(config.data.tokenizer, config.data.separator_token).vocab_size
    return override(config, {"model.vocab_size": max(config.model.num_tokens, tokens)})


def tokenizer_digest(spec: str, separator: str | None = None) -> str:
    """Identify a tokenizer and its separator by content, independent of its path: `bytes`, or a SHA-256.

    That of the words of a task, or of the file; of a Hugging Face folder those that describe its tokenizer, of a GGUF
    file the tokenizer in it.
    """
    if separator is not None:
        return hashlib.sha256(f"{tokenizer_digest(spec)} {separator}".encode()).hexdigest()
    if spec == "bytes":
        return spec
    if spec.startswith("task:"):
        return hashlib.sha256("".join(_load_words(spec).words).encode()).hexdigest()
    path = Path(spec).expanduser()
    if path.is_dir():
        content = b"".join((path / name).read_bytes() for name in _FOLDER_FILES if (path / name).is_file())
    elif path.suffix == ".gguf":
        header = read_header(path)
        content = repr(sorted((k, v) for k, v in header.metadata.items() if k.startswith("tokenizer."))).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _known(token: int | None, separator: str, spec: object) -> int:
    if token is None:
        raise ValueError(f"data.separator_token {separator!r} is no token of data.tokenizer {spec}")
    return token


def _load_words(spec: str, separator: str | None = None) -> WordTokenizer:
    from nope_jax.data.tasks import find_task  # which imports this module, since some tasks are made of tokens

    vocabulary = find_task(spec.removeprefix("task:"), "data.tokenizer").vocabulary
    if not vocabulary:
        raise ValueError(f"data.tokenizer {spec}: this task has no words of its own; bytes can read it")
    tokenizer = WordTokenizer(spec, vocabulary)
    if separator is not None:
        words = {word: i for i, word in enumerate(tokenizer.words)}
        tokenizer.separator = tokenizer.bos = _known(words.get(separator), separator, spec)
    return tokenizer


def _load_json(path: Path, separator: str | None) -> JsonTokenizer:
    return _json_tokenizer(_read_json_tokenizer(path), path, separator)


def _read_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"data.tokenizer {path} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json_tokenizer(
    tokenizer: tokenizers.Tokenizer,
    name: Path,
    named: str | None,
    separator: int | None = None,
    bos: int | None = None,
) -> JsonTokenizer:
    """With the ids of its separator and beginning-of-sequence token, found by their names where they are None.

    A separator named by the user comes before that.
    """
    vocabulary = tokenizer.get_vocab()
    if named is not None:
        separator = _known(vocabulary.get(named), named, name)
    if separator is None:
        separator = next((vocabulary[token] for token in SEPARATORS if token in vocabulary), None)
    if separator is None:
        raise ValueError(
            f"data.tokenizer {name} has no token that separates documents, one of {', '.join(SEPARATORS)}: name one of "
            "its tokens as data.separator_token"
        )
    if bos is None:
        bos = next((vocabulary[token] for token in BEGINNINGS if token in vocabulary), separator)
    return JsonTokenizer(tokenizer, max(vocabulary.values()) + 1, separator, bos)


_FOLDER_FILES = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json", "config.json"
"""Of a Hugging Face folder: the tokenizer, and what names its special tokens, the first that does so first."""


def _load_folder(folder: Path, separator: str | None) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file():
            return _load_sentencepiece(folder / "tokenizer.model", separator)
        raise ValueError(f"data.tokenizer {folder} has no tokenizer.json, nor a SentencePiece tokenizer.model")
    tokenizer = _read_json_tokenizer(folder / "tokenizer.json")
    return _json_tokenizer(
        tokenizer, folder, separator, *(_special_token(folder, tokenizer, name) for name in ("eos", "bos"))
    )


def _special_token(folder: Path, tokenizer: tokenizers.Tokenizer, name: str) -> int | None:
    """The id of the `eos` or `bos` token of a Hugging Face folder, if one of its files names it."""
    for file in _FOLDER_FILES[2:]:
        try:
            settings = json.loads((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{folder / file}: {error}") from error
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        index = tokenizer.token_to_id(token) if isinstance(token, str) else settings.get(f"{name}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int):
            return index
    return None


def _load_gguf(path: Path, separator: str | None) -> JsonTokenizer:
    tokenizer, eos, bos = build_tokenizer(read_header(path))
    return _json_tokenizer(tokenizer, path, separator, eos, bos)


def _load_sentencepiece(path: Path, separator: str | None) -> SentencePieceTokenizer:
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise ValueError(f"data.tokenizer {path}: a SentencePiece model needs pip install sentencepiece") from None
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"data.tokenizer {path} is neither a SentencePiece model nor a .json file") from error
    end = processor.eos_id()
    if separator is not None:
        token = processor.piece_to_id(separator)
        end = _known(token if processor.id_to_piece(token) == separator else None, separator, path)
    if end < 0:
        raise ValueError(
            f"data.tokenizer {path} has no end-of-sentence token to separate documents: name one of its tokens as "
            "data.separator_token"
        )
    bos = processor.bos_id() if processor.bos_id() >= 0 else end
    return SentencePieceTokenizer(processor, processor.vocab_size(), end, bos)
