"""The searches of eval.py tune: the best uniform factor, and learned factors per layer and head.

Both minimize the loss at the target length on documents of the training split: the mean over all tokens of a window,
each predicted from all tokens before it.

Shapes: B batch, T length, L layers, N query heads. Losses are in nats per token.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int

from nope_jax.checkpoint import Checkpointer
from nope_jax.data import Corpus, Mixture, describe
from nope_jax.distributed import from_process_0
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.files import replace_file, writes
from nope_jax.evaluation.common.placement import Placement
from nope_jax.evaluation.common.runs import Run, encoding_name, result_identity
from nope_jax.evaluation.registry import TuneConfig
from nope_jax.evaluation.tune.methods import LEARNED, new_encoding, with_encoding
from nope_jax.evaluation.tune.state import Learned, Outcome, Tuning
from nope_jax.models import Decoder, abstract_decoder
from nope_jax.sharding import to_host, with_logical_constraint

# Uniform factors are tried in steps of 0.2, from 0.8 to 2.4, and further out while the best is at the end of the range.
_STEPS_PER_UNIT = 5
_FIRST, _LAST = 4, 12
_LEAST, _MOST = 1, 20
_TOLERANCE = 0.01
_KEPT_EVERY = 10
"""Number of updates between two writes of tune.json."""


class Batch(NamedTuple):
    """A batch of rows of equal length, each a window of a document."""

    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    targets: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    weights: Float[Array, "B 1"] | Float[np.ndarray, "B 1"]
    """1, or 0 for padding rows."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to tune, with the method, the settings and the data."""

    run: Run
    out: Path
    method: str
    settings: TuneConfig
    corpus: Corpus | Mixture
    documents: Mapping[int, np.ndarray]
    """For each length, the corpus indices of the documents on which the loss is computed."""

    def begin(self, command: str) -> Tuning:
        """A new tuning without results."""
        return Tuning(
            method=self.method,
            source=str(self.run.workdir),
            data=describe(self.run.config.data, "train"),
            train_length=self.run.train_length,
            settings=dataclasses.asdict(self.settings),
            content=self.content(),
            lengths=[Outcome(length, len(self.documents[length])) for length in self.run.lengths],
            command=command,
            step=self.run.step,
        )

    def content(self) -> str:
        """A digest of the run's checkpoint, the code and the documents."""
        identity = result_identity(self.run, self.run.config.data.tokenizer)
        digest = hashlib.sha256(identity.encode() + self.corpus.lengths.tobytes())
        for length, indices in self.documents.items():
            for index in indices:
                digest.update(self.window(int(index), 0, length).tobytes())
        return digest.hexdigest()

    def window(self, index: int, start: int, length: int) -> Int[np.ndarray, "{length}+1"]:
        """Tokens of a window of a document, and the target of the last one."""
        # Reads only the window, since a document may be the whole corpus.
        return self.corpus.read(index, start, start + length + 1)


# Losses


def _row_nll(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, logit_scale: Any) -> Float[Array, "B"]:
    """The mean loss of each row, 0 for padding rows."""
    tokens, targets, weights = map(jnp.asarray, batch)
    model = nnx.merge(graphdef, state)
    hidden, _ = model.hidden(tokens, logit_scale=logit_scale)
    return weights[:, 0] * model.nll(hidden, targets).mean(-1)


_judge = jax.jit(_row_nll, static_argnums=0)


_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))
"""AdamW as in Wang et al., who use no weight decay; without the learning rate."""


@functools.partial(jax.jit, static_argnums=0)
def _update(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    factors: Float[Array, "L N"],
    opt_state: Any,
    batch: Batch,
    learning_rate: Float[ArrayLike, ""],
    least: Float[ArrayLike, ""],
) -> tuple[Float[Array, "L N"], Any, dict[str, Array]]:
    """Updates only the factors, kept at `least` or above. Returns factors, optimizer state and metrics."""
    rows = batch.weights.sum()
    loss, grads = jax.value_and_grad(lambda factors: _row_nll(graphdef, state, batch, factors).sum() / rows)(factors)
    updates, opt_state = _ADAM.update(grads, opt_state)
    factors = jnp.maximum(factors - learning_rate * updates, least)
    metrics = {"loss": loss, "grad_norm": jnp.linalg.norm(grads)}
    metrics |= {"least": factors.min(), "mean": factors.mean(), "most": factors.max()}
    replicated = jax.tree.map(lambda x: with_logical_constraint(x, [None] * x.ndim), (factors, opt_state))
    return *replicated, metrics


def _learning_rate(settings: TuneConfig, step: int) -> float:
    """Linear warm-up from a rate above 0, then cosine decay to a tenth, as in training."""
    warmup = (step + 1) / max(1, settings.warmup_steps)
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * min(warmup, 0.55 + 0.45 * math.cos(math.pi * min(max(progress, 0), 1)))


def _reopened(path: Path, lines: int) -> TextIO:
    """Truncates a file to its first `lines` lines and opens it to append; later lines are of unsaved updates.

    Only the first of several processes writes to it.
    """
    if not writes():
        return Path(os.devnull).open("w", encoding="utf-8")
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines] if lines else []
    with replace_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


# Searches


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = _TOLERANCE) -> float:
    """Finds the minimizer of a unimodal function on [low, high], to within `tolerance` (Kiefer 1953)."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = function(right)
    return left if at_left <= at_right else right


def best_factor(loss: Callable[[float], float], seen: dict[float, float] | None = None) -> tuple[float, float]:
    """Finds the factor with the lowest loss, and that loss. The factors tried include 1.

    Tries steps of 0.2 from 0.8 to 2.4, extends the range down to 0.2 and up to 4 while the best factor is at its end,
    and then searches between the neighbours of the best factor by golden section, to 0.01.

    Args:
        loss: function of a factor.
        seen: filled with the loss of every factor tried, infinite if not finite; factors in it are not computed again.

    Raises:
        FloatingPointError: the loss is not finite at any factor.
    """
    seen = {} if seen is None else seen

    def at(factor: float) -> float:
        if factor not in seen:
            value = loss(factor)
            seen[factor] = value if math.isfinite(value) else math.inf
        return seen[factor]

    def order(factor: float) -> tuple[float, float]:
        return at(factor), abs(factor - 1)  # ties go to the factor closest to 1

    first, last = _FIRST, _LAST
    while True:
        best = min(range(first, last + 1), key=lambda tick: order(tick / _STEPS_PER_UNIT))
        if best == first > _LEAST:
            first -= 1
        elif best == last < _MOST:
            last += 1
        else:
            break
    if math.isinf(at(best / _STEPS_PER_UNIT)):
        raise FloatingPointError("the loss is not finite, whatever the factor of the attention logits")
    golden_section(at, (best - 1) / _STEPS_PER_UNIT, (best + 1) / _STEPS_PER_UNIT)
    factor = min(seen, key=order)
    return factor, seen[factor]


class Tuner:
    """Runs the computations of one job, and reports progress."""

    def __init__(self, job: Job, tuning: Tuning, placement: Placement, bar: Bar):
        self.job, self.tuning, self.placement, self.bar = job, tuning, placement, bar
        self._batches: dict[int, list[Batch]] = {}
        bar.total(self._work())

    def find(self, model: Decoder) -> Iterator[None]:
        """Completes the tuning from its current state, and writes the checkpoint of the tuned run.

        Yields whenever the state has changed.
        """
        job, tuning = self.job, self.tuning
        for outcome in tuning.lengths:
            if outcome.loss_before is None:
                self.bar.describe(f"before, at {outcome.length:,}")
                outcome.loss_before = outcome.keep("before", self.losses(model, outcome.length))
                tuning.keep(job.out)
            yield

        learned: dict[str, np.ndarray] = {}
        if job.method == "uniform":
            for outcome in tuning.lengths:
                self._search(model, outcome)
            tuning.factor = tuning.lengths[-1].factor
        elif job.method in LEARNED:
            learned = {LEARNED[job.method]: self._learn(model)}

        encoding = new_encoding(job.run.config, job.method, job.run.lengths, factor=tuning.factor or 1.0)
        tuning.encoding = encoding_name(encoding)
        new = with_encoding(job.run.config.model, encoding, model, self.placement.mesh, learned)
        for outcome in tuning.lengths:
            self.bar.describe(f"after, at {outcome.length:,}")
            outcome.loss_after = outcome.keep("after", self.losses(new, outcome.length))
        # Left by an attempt that was interrupted here.
        from_process_0(lambda: shutil.rmtree(job.out / "checkpoints", ignore_errors=True))
        with Checkpointer(job.out) as checkpointer:
            checkpointer.save(tuning.step, {"params": nnx.state(new)})
        if tuning.learned is not None:
            tuning.learned = dataclasses.replace(tuning.learned, optimizer=None)
        self.config = new.config
        yield

    def _work(self) -> int:
        """Estimated number of tokens to read; the search for a factor may extend its range."""
        job = self.job
        once = {length: len(job.documents[length]) * length for length in job.run.lengths}
        search = _LAST - _FIRST + 1 + math.ceil(math.log(_TOLERANCE * _STEPS_PER_UNIT / 2) / math.log(0.618))
        total = 2 * sum(once.values())
        if job.method == "uniform":
            total += search * sum(once.values())
        elif job.method in LEARNED:
            total += search * once[job.run.lengths[-1]] if job.settings.start == "uniform" else 0
            total += sum(self._cost(step) for step in range(job.settings.steps))
        return total

    def _cost(self, step: int) -> int:
        # Forward, recomputed forward (remat), and backward, which costs as much as two forward passes.
        return 4 * self.job.settings.batch_size * self._length(step)

    def _length(self, step: int) -> int:
        """The length of an update. The lengths alternate such that the last update has the longest."""
        return self.job.run.lengths[(step - self.job.settings.steps) % len(self.job.run.lengths)]

    def losses(self, model: Decoder, length: int, factor: float = 1.0) -> Float[np.ndarray, "documents"]:
        """The loss of each of the job's documents at a length, read from its start."""
        if length not in self._batches:
            windows = [self.job.window(int(index), 0, length) for index in self.job.documents[length]]
            rows = self.placement.rows
            self._batches[length] = [self._place(windows[i : i + rows]) for i in range(0, len(windows), rows)]
        graphdef, state = nnx.split(model)
        with jax.set_mesh(self.placement.mesh):
            found = [to_host(_judge(graphdef, state, batch, factor)) for batch in self._batches[length]]
        count = len(self.job.documents[length])
        self.bar.advance(count * length)
        return np.concatenate(found).astype(np.float64)[:count]

    def _search(self, model: Decoder, outcome: Outcome, unit: float = 1.0) -> float:
        """Finds the best uniform factor at a length, in units of `unit`."""
        self.bar.advance(len(outcome.tried) * outcome.documents * outcome.length)

        def loss(factor: float) -> float:
            self.bar.describe(f"factors at {outcome.length:,}", f"{factor:.2f}")
            self.tuning.keep(self.job.out)
            return outcome.keep(str(factor), self.losses(model, outcome.length, factor * unit))

        outcome.factor, outcome.loss_at_factor = best_factor(loss, outcome.tried)
        return outcome.factor

    def _learn(self, model: Decoder) -> Float[np.ndarray, "L N"]:
        """Learns a factor per layer and head, resuming after the updates already made."""
        job, settings, tuning, unit = self.job, self.job.settings, self.tuning, 1.0
        if job.method == "ssmax":
            # A logit scale multiplies s·ln n, so with s = 1 it plays the role of s.
            encoding = new_encoding(job.run.config, job.method, job.run.lengths)
            ones = np.ones((job.run.config.model.num_layers, job.run.config.model.num_heads))
            model = with_encoding(job.run.config.model, encoding, model, self.placement.mesh, {LEARNED["ssmax"]: ones})
            unit = 1 / math.log(job.run.train_length)
        start = self._search(model, tuning.lengths[-1], unit) if settings.start == "uniform" else 1.0
        least = 1.0 if settings.focus and job.method == "head" else -math.inf
        tuning.start = max(start * unit, least)

        # Windows longer than those of training need more memory, so layers are rematerialized.
        remat = dataclasses.replace(model.config, remat="full")
        graphdef = nnx.split(abstract_decoder(remat))[0]
        state = nnx.state(model)
        factors = jnp.full((model.config.num_layers, model.config.num_heads), tuning.start, jnp.float32)
        opt_state = _ADAM.init(factors)
        done = 0
        if tuning.learned is not None:
            done, factors = tuning.learned.updates, jnp.asarray(tuning.learned.factors, factors.dtype)
            leaves, structure = jax.tree.flatten(opt_state)
            kept = zip(tuning.learned.optimizer or leaves, leaves, strict=True)
            opt_state = jax.tree.unflatten(structure, [jnp.asarray(value, leaf.dtype) for value, leaf in kept])
        # Sharded as an update returns them, or the first update would compile separately.
        factors, opt_state = jax.device_put((factors, opt_state), NamedSharding(self.placement.mesh, PartitionSpec()))
        self.bar.advance(sum(map(self._cost, range(done))))
        with _reopened(job.out / "tune.jsonl", done) as file:
            for step in range(done, settings.steps):
                length, rate = self._length(step), _learning_rate(settings, step)
                self.bar.describe("updates", f"{step + 1} of {settings.steps}")
                batch = self._draw(step, length)
                with jax.set_mesh(self.placement.mesh):
                    factors, opt_state, metrics = _update(graphdef, state, factors, opt_state, batch, rate, least)
                values = {name: float(value) for name, value in metrics.items()}
                for name in "loss", "grad_norm":
                    if not math.isfinite(values[name]):
                        raise FloatingPointError(
                            f"{name} is {values[name]} at update {step + 1}; a smaller --tune.learning_rate may help, "
                            "with another --out"
                        )
                line = {"step": step + 1, "length": length, "learning_rate": rate, **values}
                file.write(json.dumps(line) + "\n")
                file.flush()
                # As JSON numbers, which round-trip floats exactly.
                numbers, *leaves = (np.asarray(leaf).tolist() for leaf in (factors, *jax.tree.leaves(opt_state)))
                tuning.learned = Learned(step + 1, numbers, leaves)
                if (step + 1) % _KEPT_EVERY == 0:
                    tuning.keep(job.out)
                self.bar.advance(self._cost(step))
        return np.asarray(factors)

    def _draw(self, step: int, length: int) -> Batch:
        """Draws the batch of an update: random windows of documents that reach the length."""
        random = np.random.default_rng((self.job.settings.seed, step))
        lengths = self.job.corpus.lengths
        indices = random.choice(np.flatnonzero(lengths > length), self.job.settings.batch_size)
        starts = random.integers(lengths[indices] - length)
        windows = [self.job.window(int(i), int(start), length) for i, start in zip(indices, starts, strict=True)]
        return self._place(windows)

    def _place(self, windows: Sequence[np.ndarray]) -> Batch:
        rows = np.zeros((self.placement.rows, len(windows[0])), np.int32)
        rows[: len(windows)] = windows
        weights = (np.arange(len(rows)) < len(windows)).astype(np.float32)[:, None]
        return self.placement.put(Batch(rows[:, :-1], rows[:, 1:], weights))
