"""What models write after prompts."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from nope_jax.data import Tokenizer
from nope_jax.models import Decoder, generate


def write(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Int[np.ndarray, "_"]],
    room: int,
    *,
    batch_size: int,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[str]:
    """Continue prompts greedily: by at most `room` tokens, up to the one that ends a document.

    Args:
        model: a decoder that has the positions of each prompt and its continuation.
        tokenizer: its tokenizer.
        prompts: tokens, at least one each; those of similar length should stand together.
        room: number of tokens.
        batch_size: prompts continued at a time.
        advance: called with the number of prompts just continued, to report progress.
    """
    texts: list[str] = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        rows = [*batch, *[batch[0]] * (batch_size - len(batch))]  # one size, so that they share a compiled program
        lengths = np.array([len(row) for row in rows])
        padded = np.zeros((batch_size, lengths.max()), np.int32)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        stop = tokenizer.separator
        written = np.asarray(generate(model, padded, room, stop_tokens=(stop,), prompt_lengths=lengths))
        for line, length in zip(written[: len(batch)], lengths, strict=False):
            new = line[length : length + room]
            ends = np.flatnonzero(new == stop)
            # A model may have more outputs than its tokenizer has tokens.
            new = new[: ends[0] if len(ends) else None]
            texts.append(tokenizer.decode(new[new < tokenizer.vocab_size]))
        advance(len(batch))
    return texts


def encode(tokenizer: Tokenizer, prompt: str, *, bos: bool) -> Int[np.ndarray, "_"]:
    """The tokens of a prompt, after a bos if a model reads one."""
    tokens = np.asarray(tokenizer.encode(prompt), np.int32)
    return np.insert(tokens, 0, tokenizer.bos) if bos else tokens
