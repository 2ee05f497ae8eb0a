"""Text from a trained model, printed as it comes: what generate.py does."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nope_jax.config import MeshConfig, Step
from nope_jax.data import load_tokenizer
from nope_jax.data.tokenizers import Tokenizer, tokenizer_digest
from nope_jax.interop import Dtype
from nope_jax.models import Decoder, generate_stream
from nope_jax.paths import Location
from nope_jax.sharding import check_model_fits, make_mesh
from nope_jax.trained import find_trained

DEFAULT_TOKENS = 256
"""New tokens if no number is given; fewer if the encoding has no more positions."""


class GenerateOptions(NamedTuple):
    """The command line of generate.py."""

    workdir: Location
    """Or hf:... or gguf:... for a published model."""
    prompt: str
    """The text to continue; "-" reads it from stdin."""
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the output, and are not printed."""
    dtype: Dtype | None = None
    step: Step = "newest"
    mesh: MeshConfig | None = None
    """Shards the parameters over all devices; None: they are on the first."""


class LoadedModel(NamedTuple):
    """A model with what turns its tokens into text."""

    model: Decoder
    tokenizer: Tokenizer
    begins_with_bos: bool
    """Whether every sequence that the model has seen starts with the tokenizer's BOS token."""


def load(
    workdir: str | os.PathLike[str], dtype: Dtype | None = None, step: Step = "newest", mesh: Mesh | None = None
) -> LoadedModel:
    """Load a trained model and its tokenizer.

    Args:
        workdir: The workdir of a run, or hf:NAME_OR_FOLDER or gguf:FILE.
        dtype: Of parameters and computation, see `Trained.load`.
        step: The checkpoint of a run, see `find_trained`.
        mesh: Devices to shard the parameters over, see `Trained.load`.

    Raises:
        ValueError: There is no such model, the mesh does not divide it, or its tokenizer is missing or not the one that
            it was trained with.
    """
    trained = find_trained(workdir, step)
    config = trained.config
    if mesh is not None:
        check_model_fits(config.model, mesh)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.separator_token)
    if tokenizer.vocab_size > config.model.num_tokens:
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} tokens, but {workdir} was trained "
            f"with model.vocab_size {config.model.vocab_size}"
        )
    if trained.tokenizer_digest() not in (None, tokenizer_digest(config.data.tokenizer, config.data.separator_token)):
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer!r} is not the tokenizer that {workdir} was trained with"
        )
    return LoadedModel(trained.load(mesh, dtype)[0], tokenizer, config.data.bos)


def write_text(options: GenerateOptions, out: Any) -> None:
    """Write the continuation of a prompt to a text file piece by piece, and a newline at its end.

    Raises:
        ValueError: As `load` and `generate`, or the prompt has no token.
    """
    text = sys.stdin.buffer.read() if options.prompt == "-" else options.prompt
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for piece in continuation(load(options.workdir, options.dtype, options.step, mesh), text, options):
            out.write(piece)
            out.flush()
    out.write("\n")
    out.flush()


def continuation(loaded: LoadedModel, text: str | bytes, options: GenerateOptions) -> Iterator[str]:
    """Yield the continuation of a text in pieces of whole characters."""
    model, tokenizer, begins_with_bos = loaded
    prompt = [*[tokenizer.bos] * begins_with_bos, *tokenizer.encode(text).tolist()]
    if not prompt:
        raise ValueError("--prompt must have at least one token: the model's sequences begin without a BOS token")
    count = options.max_new_tokens
    if count is None:
        room = DEFAULT_TOKENS if model.max_length is None else model.max_length + 1 - len(prompt)
        count = max(1, min(DEFAULT_TOKENS, room))  # if the prompt is too long already, generate says so
    tokens = generate_stream(
        model,
        np.array([prompt], np.int32),
        count,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        key=jax.random.key(options.seed),
        stop_tokens=[tokenizer.separator],
    )
    return until_stop(characters(tokenizer, prompt, (int(row[0]) for row in tokens)), options.stop)


_CONTEXT = 8
"""Tokens decoded together with a new one: whether it starts with a space may depend on those before it."""
_LONGEST = 4
"""Most tokens of one character, which has up to four bytes."""


def characters(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Decode tokens as they come. A token may end within a character, which is held back until the rest of it comes.

    Args:
        tokenizer: The tokenizer.
        prompt: The tokens before them.
        tokens: New tokens; the tokenizer's separator is left out.
    """
    before, pending = list(prompt[-_CONTEXT:]), list[int]()
    for token in tokens:
        if token == tokenizer.separator:
            break
        pending.append(token)
        text = _decoded_after(tokenizer, before, pending)
        if text.endswith("\ufffd") and len(pending) < _LONGEST:
            continue
        yield text
        before, pending = [*before, *pending][-_CONTEXT:], []
    if pending:
        yield _decoded_after(tokenizer, before, pending)


def _decoded_after(tokenizer: Tokenizer, before: list[int], tokens: list[int]) -> str:
    known = tokenizer.decode(np.array(before, np.int32))
    return tokenizer.decode(np.array([*before, *tokens], np.int32))[len(known) :]


def until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield pieces of text up to the first of the stop texts, holding back what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        sizes = (n for text in stop for n in range(min(len(text) - 1, len(held)), 0, -1) if held.endswith(text[:n]))
        sure = len(held) - max(sizes, default=0)
        yield held[:sure]
        held = held[sure:]
    yield held
