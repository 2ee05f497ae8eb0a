"""Loss and attention entropy by position: measured on the device, summed by document and position bucket.

Shapes: B batch, T length, L layers, N query heads, D documents, P position buckets. Losses and entropies are in nats.
"""

import dataclasses
import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nope_jax.evaluation.common.documents import Window, plan_windows
from nope_jax.evaluation.common.uncertainty import Estimate, ratio
from nope_jax.sharding import to_host

KEEP_EVERY = 60.0
"""Seconds between two saves of the sums of an unfinished curve."""


def bucket_edges(length: int) -> Int[np.ndarray, "edges"]:
    """Edges of the position buckets: 0, 1, ..., 8, then eight per octave, clipped to `length`.

    They are the same for every run and length, and every power of two is an edge.
    """
    edges, octave = list(range(8)), 8
    while octave < length:
        edges += range(octave, 2 * octave, octave // 8)
        octave *= 2
    return np.array([edge for edge in edges if edge < length] + [length])


@dataclasses.dataclass(frozen=True)
class Curve:
    """Results of one run at one length."""

    edges: Int[np.ndarray, "edges"]
    nll_sum: Float[np.ndarray, "D P"]
    """Negative log-likelihood, summed over the tokens of each document in each bucket."""
    tokens: Int[np.ndarray, "D P"]
    entropy_sum: Float[np.ndarray, "D P"]
    """Attention entropy, averaged over layers and heads and summed over the tokens of each document in each bucket."""
    heads: Float[np.ndarray, "L N T"]
    """Entropy of each head at each position, averaged over documents."""
    text_bytes: Int[np.ndarray, "D P"]
    """Bytes of text of the tokens; zeros if unknown."""
    step_bytes: int = 0
    """Memory of the compiled step on each device: arguments, results and temporaries."""
    peak_bytes: int = 0
    """Peak memory at the end of the measurement; see `peak_memory`."""
    seconds: float = 0.0
    """Time to read the windows, without compiling; of the last part, if the measurement was interrupted."""
    tokens_read: int = 0
    """Tokens read in that time."""

    @property
    def length(self) -> int:
        return int(self.edges[-1])

    @property
    def documents(self) -> int:
        return len(self.tokens)

    @property
    def nll(self) -> Estimate:
        """Mean over the tokens of each bucket, [P]."""
        return ratio(self.nll_sum, self.tokens)

    @property
    def bits_per_byte(self) -> Estimate:
        """Loss per byte of text; NaN in a bucket without text, such as a single token within a multi-byte character."""
        return ratio(self.nll_sum / math.log(2), self.text_bytes)

    @property
    def entropy(self) -> Estimate:
        """Mean over layers, heads and the tokens of each bucket."""
        return ratio(self.entropy_sum, self.tokens)

    def between(self, start: int, end: int, documents: int | None = None) -> "Curve":
        """Pools all buckets within [start, end) into one, over the first `documents` (None: all)."""
        inside = (self.edges[:-1] >= start) & (self.edges[1:] <= end)

        def pooled(values: np.ndarray) -> np.ndarray:
            return values[:documents, inside].sum(1, keepdims=True)

        sums = map(pooled, (self.nll_sum, self.tokens, self.entropy_sum, self.text_bytes))
        nll_sum, tokens, entropy_sum, text_bytes = sums
        return Curve(np.array([start, end]), nll_sum, tokens, entropy_sum, self.heads[..., start:end], text_bytes)

    def coarser(self, tokens: int, start: int, boundary: int) -> "Curve":
        """Pools neighbouring buckets from `start` on until each holds at least so many tokens.

        No bucket crosses `boundary`. The last bucket before it, and the last of all, are pooled with their neighbours
        if they hold fewer tokens.
        """
        held = self.tokens.sum(0)
        kept, waiting = [start], 0
        for i in range(int(np.searchsorted(self.edges, start)), len(held)):
            end, waiting = int(self.edges[i + 1]), waiting + int(held[i])
            if waiting >= tokens or end in (boundary, self.length):
                if waiting < tokens and kept[-1] not in (start, boundary):
                    kept.pop()
                kept.append(end)
                waiting = 0
        first = np.searchsorted(self.edges, kept)

        def pooled(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values[:, : first[-1]], first[:-1], axis=1)

        sums = map(pooled, (self.nll_sum, self.tokens, self.entropy_sum, self.text_bytes))
        nll_sum, counts, entropy_sum, text_bytes = sums
        return dataclasses.replace(
            self, edges=np.array(kept), nll_sum=nll_sum, tokens=counts, entropy_sum=entropy_sum, text_bytes=text_bytes
        )


@dataclasses.dataclass
class Sums:
    """Sums over the first windows of a curve, from which an interrupted measurement resumes."""

    windows: int
    nll: Float[np.ndarray, "D P"]
    tokens: Int[np.ndarray, "D P"]
    text_bytes: Int[np.ndarray, "D P"]
    entropy: Float[np.ndarray, "D P"]
    """Averaged over layers and heads."""
    heads: Float[np.ndarray, "*heads T"]
    """Entropy of each head, [L, N, T] after the first window."""
    position_tokens: Int[np.ndarray, "T"]


def peak_memory() -> int:
    """Peak memory so far, in bytes: of the fullest device, or of this process if the devices do not report it.

    The peak never falls: it includes everything loaded, compiled and measured before. For the process it is the maximum
    resident set size.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(stat["peak_bytes_in_use"] for stat in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@functools.partial(jax.jit, static_argnums=0)
def evaluation_step(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counts: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "L N T"]]:
    """Loss per token, mean entropy of all heads per token, and entropy of each head summed over the batch.

    Tokens that do not count contribute 0.
    """
    model = nnx.merge(graphdef, state)
    hidden, stats = model.hidden(tokens, return_stats=True)
    nll = model.nll(hidden, targets)
    entropy = jnp.where(counts[None, :, None, :], stats.entropy, 0)
    return jnp.where(counts, nll, 0), entropy.mean((0, 2)), entropy.sum(1)


def measure(
    model: nnx.Module,
    documents: Sequence[Int[np.ndarray, "_"]],
    length: int,
    *,
    byte_lengths: Sequence[Int[np.ndarray, "_"]] | None = None,
    stride: int | None = None,
    bos: bool = False,
    batch_size: int = 8,
    place: Callable[[tuple], tuple] = jax.device_put,
    advance: Callable[[int], object] = lambda tokens: None,
    done: Sums | None = None,
    keep: Callable[[Sums], object] = lambda sums: None,
) -> Curve:
    """Measures loss and attention entropy by position.

    Args:
        model: has `hidden(tokens [B, T], return_stats=True)`, which returns hidden states and statistics whose
            `entropy` is [L, B, N, T], and `nll(hidden, targets)`, which returns the loss of every token.
        documents: token ids, more than `length` per document.
        length: tokens per window.
        byte_lengths: bytes of text per token of each document; None: unknown.
        stride: None, or the step of a sliding window (see `nope_jax.evaluation.common.documents`).
        bos: whether every window of a document begins with the document's first token.
        batch_size: windows per call of the model.
        place: puts a tuple of arrays [B, T] on the devices.
        advance: called with the number of tokens just read, to report progress.
        done: the last sums passed to `keep` before the same measurement was interrupted.
        keep: called every KEEP_EVERY seconds with the sums so far.
    """
    edges = bucket_edges(length)
    shape = len(documents), len(edges) - 1
    sums = done or Sums(
        0,
        np.zeros(shape),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape),
        np.zeros(length),
        np.zeros(length, np.int64),
    )
    windows = plan_windows([len(document) for document in documents], length, stride)
    left = windows[sums.windows :]
    if done:
        advance(done.windows * length)

    graphdef, state = nnx.split(model)
    first = place(_stack(documents, left[:batch_size], length, batch_size, bos))
    step_bytes = program_memory(evaluation_step.lower(graphdef, state, *first).compile())  # reused by the calls below

    def results() -> Iterator[tuple]:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            inputs, targets, counts = _stack(documents, batch, length, batch_size, bos)
            yield batch, counts, evaluation_step(graphdef, state, *place((inputs, targets, counts)))

    last_kept = started = time.monotonic()
    for batch, counts, (nll, entropy, heads) in _one_ahead(results()):
        # Padded rows contribute 0, so they can be added to any document.
        rows = np.array([window.document for window in batch] + [0] * (batch_size - len(batch)))
        for total, of_tokens in ((sums.nll, nll), (sums.entropy, entropy)):
            np.add.at(total, rows, np.add.reduceat(to_host(of_tokens).astype(np.float64), edges[:-1], axis=1))
        np.add.at(sums.tokens, rows, np.add.reduceat(counts, edges[:-1], axis=1, dtype=np.int64))
        for window, counted in zip(batch, counts, strict=False):
            if byte_lengths is not None:
                of_targets = byte_lengths[window.document][window.start + 1 : window.start + 1 + length]
                sums.text_bytes[window.document] += np.add.reduceat(of_targets * counted, edges[:-1])
        sums.position_tokens += counts.sum(0)
        sums.heads = sums.heads + to_host(heads).astype(np.float64)
        sums.windows += len(batch)
        advance(len(batch) * length)
        if time.monotonic() - last_kept > KEEP_EVERY and sums.windows < len(windows):
            keep(sums)
            last_kept = time.monotonic()

    seconds = time.monotonic() - started
    heads = (sums.heads / sums.position_tokens).astype(np.float32)
    totals = (sums.nll, sums.tokens, sums.entropy, heads, sums.text_bytes)
    return Curve(edges, *totals, step_bytes, peak_memory(), seconds, len(left) * length)


def program_memory(step: jax.stages.Compiled) -> int:
    """Memory of a compiled program on each device, in bytes; 0 if the backend does not report it."""
    stats = step.memory_analysis()
    if stats is None:
        return 0
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def _stack(documents: Sequence[np.ndarray], batch: Sequence[Window], length: int, batch_size: int, bos: bool) -> tuple:
    """Inputs, targets and a mask of scored targets, [B, T]; padding rows repeat the last window, unscored."""
    padding = batch_size - len(batch)
    padded = [*batch, *[batch[-1]] * padding]
    tokens = np.stack([documents[w.document][w.start : w.start + length + 1] for w in padded]).astype(np.int32)
    if bos:
        tokens[:, 0] = [documents[w.document][0] for w in padded]
    scored_from = np.array([w.scored_from for w in batch] + [length] * padding)
    return tokens[:, :-1], tokens[:, 1:], np.arange(length) >= scored_from[:, None]


def _one_ahead(results: Iterable[tuple]) -> Iterator[tuple]:
    """Yields each result after requesting the next one, so that the device works while the host sums."""
    waiting = []
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
