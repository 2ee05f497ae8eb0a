"""Batches for training and for validation during training; each row depends only on its index.

B rows of this process, T context length.
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int

from nope_jax.config import DataConfig
from nope_jax.data.corpora import Corpus, Split, load_corpus
from nope_jax.data.examples import ExampleRows
from nope_jax.data.tasks import find_task
from nope_jax.data.windows import Windows, step_windows


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
    corpus: Corpus | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yield training batches from `start_step` on, indefinitely, prefetched in background threads.

    Row r of step s does not depend on the number of processes or on `start_step`; each process gets a contiguous share
    of the rows. Pass `corpus` if the training split is already loaded.

    Raises:
        ValueError: data.batch_size is not a multiple of the processes, or the corpus is shorter than one window.
    """
    rows = _rows(config, process_index, process_count)
    windows = _windows(config, "train", config.seed, corpus)

    def batch(step: int) -> Batch:
        return _stack(windows, step_windows(step, rows, config.batch_size, len(windows), config.seed), config)

    steps = grain.MapDataset.range(start_step, sys.maxsize)
    return iter(steps.map(batch).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def validation_batches(
    config: DataConfig,
    num_batches: int,
    *,
    corpus: Corpus | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """Return batches of windows spread evenly over the validation documents; they are the same for every seed and call.

    If there are fewer windows than rows, windows are repeated as evenly as possible. Pass `corpus` if the validation
    split is already loaded.

    Raises:
        ValueError: as `train_batches`.
    """
    rows = _rows(config, process_index, process_count)
    windows = _windows(config, "validation", 0, corpus)
    count = num_batches * config.batch_size
    chosen = (np.arange(count) * len(windows) // count).reshape(num_batches, config.batch_size)
    return [_stack(windows, indices[rows.start : rows.stop], config) for indices in chosen]


def masks_loss(config: DataConfig) -> bool:
    """Whether the batches of this config have a `loss_mask`."""
    return config.source.startswith("task:") and find_task(config.source.removeprefix("task:")).answer_only


def _rows(config: DataConfig, process_index: int, process_count: int) -> range:
    if config.batch_size % process_count:
        raise ValueError(f"data.batch_size {config.batch_size} must be a multiple of the {process_count} processes")
    share = config.batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _windows(config: DataConfig, split: Split, seed: int, corpus: Corpus | None) -> Windows | ExampleRows:
    corpus = load_corpus(config, split) if corpus is None else corpus
    if corpus.answers is not None:
        return ExampleRows(corpus, config.context_length, config.source, packed=config.document_mask)
    windows = Windows(corpus, config.context_length, seed)
    if not len(windows):
        needed = config.context_length + (not config.bos)
        raise ValueError(
            f"data.context_length {config.context_length} needs {needed} tokens, but the {split} split of data.source "
            f"{config.source} has {len(corpus.tokens)}"
        )
    return windows


def _stack(windows: Windows | ExampleRows, indices: Int[np.ndarray, "B"], config: DataConfig) -> Batch:
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
