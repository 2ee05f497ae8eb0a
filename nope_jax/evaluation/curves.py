"""Loss and attention entropy by position: measured on the device, kept by document and position bucket.

B batch, T length, L layers, N query heads, D documents, P position buckets. Losses and entropies in nats.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nope_jax.evaluation.protocol import Window, plan_windows


def bucket_edges(length: int) -> Int[np.ndarray, "edges"]:
    """Edges of the position buckets: 0, 1, ..., 8, and from there eight per octave, clipped to `length`.

    The same for every run and every length, and every power of two is an edge.
    """
    edges, octave = list(range(8)), 8
    while octave < length:
        edges += range(octave, 2 * octave, octave // 8)
        octave *= 2
    return np.array([edge for edge in edges if edge < length] + [length])


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one run scored at one length."""

    edges: Int[np.ndarray, "edges"]
    nll_sum: Float[np.ndarray, "D P"]
    """Negative log-likelihood, summed over the tokens of a document in a bucket."""
    tokens: Int[np.ndarray, "D P"]
    entropy: Float[np.ndarray, "P"]
    """Mean over layers, heads, documents and positions of the bucket."""
    heads: Float[np.ndarray, "L N T"]
    """Mean entropy over documents, at every position."""

    @property
    def length(self) -> int:
        return int(self.edges[-1])

    @property
    def documents(self) -> int:
        return len(self.tokens)

    @property
    def nll(self) -> Float[np.ndarray, "P"]:
        """Mean over the tokens of a bucket."""
        return self.nll_sum.sum(0) / self.tokens.sum(0)

    @property
    def nll_stderr(self) -> Float[np.ndarray, "P"]:
        """Standard error of `nll`, each document's mean being one sample; NaN where there is only one document."""
        if self.documents == 1:
            return np.full(len(self.entropy), np.nan)
        return (self.nll_sum / self.tokens).std(0, ddof=1) / np.sqrt(self.documents)

    def perplexity(self, start: int, end: int, documents: int | None = None) -> float:
        """Perplexity over the buckets that lie in [start, end), of the first `documents` (None: all)."""
        inside = (self.edges[:-1] >= start) & (self.edges[1:] <= end)
        nll, tokens = (x[:documents, inside].sum() for x in (self.nll_sum, self.tokens))
        return float(perplexity(nll / tokens))


def perplexity(nll: np.ndarray) -> np.ndarray:
    """exp(nll), infinite where that overflows."""
    with np.errstate(over="ignore"):
        return np.exp(nll)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counts: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "L N T"]]:
    """Loss per token and entropy summed over the batch, both zero where a token does not count."""
    model = nnx.merge(graphdef, state)
    hidden, stats = model.hidden(tokens, return_stats=True)
    nll = model.nll(hidden, targets)
    entropy = jnp.where(counts[None, :, None, :], stats.entropy, 0).sum(1)
    return jnp.where(counts, nll, 0), entropy


def measure(
    model: nnx.Module,
    documents: Sequence[Int[np.ndarray, "_"]],
    length: int,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    place: Callable[[tuple], tuple] = jax.device_put,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Curve:
    """Measures loss and attention entropy by position.

    Args:
        model: its `hidden(tokens [B, T], return_stats=True)` gives hidden states and statistics whose `entropy` is
            [L, B, N, T], its `nll(hidden, targets)` the loss of every token.
        documents: token ids, each more than `length` of them.
        length: tokens the model reads at once.
        stride: None, or the step of a sliding window (see `nope_jax.evaluation.protocol`).
        batch_size: windows per call of the model.
        place: puts a tuple of arrays [B, T] on the devices.
        advance: called with the number of tokens just read, to report progress.
    """
    edges = bucket_edges(length)
    nll_sum = np.zeros((len(documents), len(edges) - 1))
    tokens = np.zeros(nll_sum.shape, np.int64)
    entropy_sum = np.zeros(length)
    position_tokens = np.zeros(length, np.int64)

    graphdef, state = nnx.split(model)

    def results() -> Iterator[tuple]:
        windows = plan_windows([len(document) for document in documents], length, stride)
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            inputs, targets, counts = _stack(documents, batch, length, batch_size)
            yield batch, counts, _score(graphdef, state, *place((inputs, targets, counts)))

    for batch, counts, (nll, entropy) in _one_ahead(results()):
        # Padded rows count nothing, so that they may be added to any document.
        rows = np.array([window.document for window in batch] + [0] * (batch_size - len(batch)))
        np.add.at(nll_sum, rows, np.add.reduceat(np.asarray(nll, np.float64), edges[:-1], axis=1))
        np.add.at(tokens, rows, np.add.reduceat(counts, edges[:-1], axis=1, dtype=np.int64))
        position_tokens += counts.sum(0)
        entropy_sum = entropy_sum + np.asarray(entropy, np.float64)
        advance(len(batch) * length)

    by_bucket = np.add.reduceat(entropy_sum.mean((0, 1)), edges[:-1]) / tokens.sum(0)
    return Curve(edges, nll_sum, tokens, by_bucket, (entropy_sum / position_tokens).astype(np.float32))


def _stack(documents: Sequence[np.ndarray], batch: Sequence[Window], length: int, batch_size: int) -> tuple:
    """Inputs, targets and which of them count, [B, T]; rows past the last window repeat it and count nothing."""
    padding = batch_size - len(batch)
    padded = [*batch, *[batch[-1]] * padding]
    tokens = np.stack([documents[w.document][w.start : w.start + length + 1] for w in padded]).astype(np.int32)
    scored_from = np.array([w.scored_from for w in batch] + [length] * padding)
    return tokens[:, :-1], tokens[:, 1:], np.arange(length) >= scored_from[:, None]


def _one_ahead(results: Iterable[tuple]) -> Iterator[tuple]:
    """Yields each result after the next was asked for, so that the device works while the host adds up."""
    waiting = []
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
