"""Batches for training and for validation during training; each row depends only on its index.

B rows of this process, T context length.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from nope_jax.config import DataConfig
from nope_jax.data.corpora import Corpus, Mixture, Split, load_corpus
from nope_jax.data.examples import ExampleRows
from nope_jax.data.mixing import mix
from nope_jax.data.sources import members as members_of
from nope_jax.data.sources import source_of
from nope_jax.data.tasks import find_task
from nope_jax.data.windows import Windows, epoch_windows


class Batch(NamedTuple):
    """The rows of one process, int32 except for the mask."""

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    """The next token of each token."""
    positions: Int[np.ndarray, "B T"] | None = None
    """None: 0 to T - 1. With data.document_mask they restart at each document."""
    segment_ids: Int[np.ndarray, "B T"] | None = None
    """None unless data.document_mask: index, from 1, of the document in its row that a token belongs to."""
    loss_mask: Bool[np.ndarray, "B T"] | None = None
    """Which targets count in the loss. None: all; the answers alone for examples of a task."""


def train_batches(
    config: DataConfig,
    *,
    start_step: int = 0,
    corpus: Corpus | Mixture | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yield training batches from `start_step` on, indefinitely, prefetched in background threads.

    Row r of step s does not depend on the number of processes or on `start_step`; each process gets a contiguous share
    of the rows. Pass `corpus` if the training split is already loaded.

    Raises:
        ValueError: data.batch_size is not a multiple of the processes, or the corpus is shorter than one window.
    """
    share = _rows(config, process_index, process_count)
    members = _members(config, "train", config.seed, corpus)
    weights, masked = _weights(config, members), masks_loss(config)

    def batch(step: int) -> Batch:
        sources, rows = mix(step * config.batch_size + np.array(share), weights)
        windows = np.empty_like(rows)
        for source, member in enumerate(members):
            windows[sources == source] = epoch_windows(rows[sources == source], len(member), config.seed)
        return _gather(members, sources, windows, config, masked)

    import grain  # late, because only training needs it

    steps = grain.MapDataset.range(start_step, sys.maxsize)
    return iter(steps.map(batch).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def validation_batches(
    config: DataConfig,
    num_batches: int,
    *,
    corpus: Corpus | Mixture | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """Return batches of windows spread evenly over the validation documents; they are the same for every seed and call.

    Several sources have the same shares of the rows as in training. If there are fewer windows than rows, windows are
    repeated as evenly as possible. Pass `corpus` if the validation split is already loaded.

    Raises:
        ValueError: as `train_batches`.
    """
    share = _rows(config, process_index, process_count)
    members = _members(config, "validation", 0, corpus)
    sources, rows = mix(np.arange(num_batches * config.batch_size), _weights(config, members))
    counts = np.bincount(sources, minlength=len(members))
    windows = rows * np.array([len(member) for member in members])[sources] // counts[sources]
    starts = [batch * config.batch_size for batch in range(num_batches)]
    of_batches = [slice(start + share.start, start + share.stop) for start in starts]
    masked = masks_loss(config)
    return [_gather(members, sources[part], windows[part], config, masked) for part in of_batches]


def masks_loss(config: DataConfig) -> bool:
    """Whether the batches of this config have a `loss_mask`: those of all sources do if those of one do."""
    names = [*config.sources, config.validation_source or ""]
    return any(find_task(name.removeprefix("task:")).answer_only for name in names if name.startswith("task:"))


def _rows(config: DataConfig, process_index: int, process_count: int) -> range:
    if config.batch_size % process_count:
        raise ValueError(f"data.batch_size {config.batch_size} must be a multiple of the {process_count} processes")
    share = config.batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


Rows = Windows | ExampleRows
"""The rows of a corpus, by their indices."""


def _members(config: DataConfig, split: Split, seed: int, corpus: Corpus | Mixture | None) -> list[Rows]:
    """The rows of each source of a split."""
    corpora = (load_corpus(config, split) if corpus is None else corpus).members
    configs = members_of(config, split)
    return [_windows(*pair, split, seed) for pair in zip(configs, corpora, strict=True)]


def _windows(config: DataConfig, corpus: Corpus, split: Split, seed: int) -> Rows:
    source = source_of(config, split)
    if corpus.answers is not None:
        return ExampleRows(corpus, config.context_length, str(source), packed=config.document_mask)
    windows = Windows(corpus, config.context_length, seed)
    if not len(windows):
        needed = config.context_length + (not config.bos)
        raise ValueError(
            f"data.context_length {config.context_length} needs {needed} tokens, but the {split} split of {source} has "
            f"{len(corpus.tokens)}"
        )
    return windows


def _weights(config: DataConfig, members: Sequence[Rows]) -> Sequence[float]:
    """The shares of the sources in the rows; those of their sizes unless they are given."""
    given = len(members) > 1 and config.weights
    return config.weights if given else [len(member) for member in members]  # type: ignore[return-value]


def _gather(
    members: Sequence[Rows],
    sources: Int[np.ndarray, "B"],
    windows: Int[np.ndarray, "B"],
    config: DataConfig,
    masked: bool,
) -> Batch:
    """The batch of rows, each given by its source and its index among the rows of that source.

    With `masked`, it has a `loss_mask`, in which all targets of a text count.
    """
    parts = [
        _stack(member, windows[sources == source], config) for source, member in enumerate(members) if source in sources
    ]
    if masked:
        parts = [
            part if part.loss_mask is not None else part._replace(loss_mask=np.ones_like(part.tokens, bool))
            for part in parts
        ]
    place = np.argsort(np.argsort(sources, kind="stable"))
    columns: Any = zip(*parts, strict=True)
    merged: Any = [None if column[0] is None else np.concatenate(column)[place] for column in columns]
    return Batch(*merged)


def _stack(windows: Rows, indices: Int[np.ndarray, "B"], config: DataConfig) -> Batch:
    if isinstance(windows, ExampleRows):
        columns: Any = zip(*[windows[index] for index in indices], strict=True)
        stacked: Any = [None if column[0] is None else np.stack(column) for column in columns]
        return Batch(*stacked)
    tokens = np.stack([windows[index] for index in indices])
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    if config.document_mask:
        positions, segment_ids = map(np.stack, zip(*[windows.segments(index) for index in indices], strict=True))
        inputs = batch.tokens if windows.bos is None else np.where(positions, batch.tokens, np.int32(windows.bos))
        batch = batch._replace(tokens=inputs, positions=positions, segment_ids=segment_ids)
    return batch
