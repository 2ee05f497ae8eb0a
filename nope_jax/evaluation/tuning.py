"""What lets a trained run hold past its training length: factors of its attention logits, or a scaling of its RoPE.

Factors are those of Wang et al. 2024 (arXiv 2404.12224): one for all heads (`UniformScale`), or one per layer and head
that is learned while all else is frozen (`HeadScale`, `SSMax`). They are found on documents of the training split, by
the loss at the target length: the mean over all of a window's tokens, each predicted from all those before it.

Shapes: B batch, T length, L layers, N query heads. Losses in nats per token.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.cli import EvalArguments
from nope_jax.config import Config, EncodingSpec, MeshConfig, ModelConfig, TuneConfig
from nope_jax.data import Corpus, load_corpus
from nope_jax.encodings import (
    DynamicNTKScaling,
    Encoding,
    HeadScale,
    LinearScaling,
    LogN,
    NTKScaling,
    RoPE,
    RotaryScaling,
    SSMax,
    UniformScale,
    Wrapper,
    YaRNScaling,
    resolve,
)
from nope_jax.evaluation.files import replace_file
from nope_jax.evaluation.protocol import choose_documents
from nope_jax.evaluation.run import encoding_name, newest_step
from nope_jax.models import Decoder, adopt_weights
from nope_jax.sharding import make_mesh, place_batch, state_shardings

LEARNED = {"head": "head_scale", "ssmax": "ssmax"}
"""The methods that learn a factor per layer and head, and the parameter of a layer that holds them."""

# Uniform factors are tried in steps of 0.2: those from 0.8 to 2.4, and further out where the best is an outermost.
_STEPS_PER_UNIT = 5
_FIRST, _LAST = 4, 12
_LEAST, _MOST = 1, 20
_TOLERANCE = 0.01


class Batch(NamedTuple):
    """Rows of one length, each a window of a document."""

    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    targets: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    weights: Float[Array, "B 1"] | Float[np.ndarray, "B 1"]
    """1; 0 for a row that only fills up the devices."""


@dataclasses.dataclass
class Outcome:
    """What was found at one length; None where it has not been computed or the method has no such thing."""

    length: int
    documents: int
    loss_before: float | None = None
    factor: float | None = None
    """The best factor for all layers and heads."""
    loss_at_factor: float | None = None
    loss_after: float | None = None
    """Of the run that is written."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to tune, and what for."""

    workdir: Path
    out: Path
    config: Config
    method: str
    lengths: tuple[int, ...]
    """Ascending."""
    settings: TuneConfig
    corpus: Corpus
    documents: Mapping[int, np.ndarray]
    """For each length, the indices in the corpus of the documents that a loss is taken over."""

    @property
    def train_length(self) -> int:
        assert self.config.model.train_length is not None  # Config fills it in
        return self.config.model.train_length


def tune(options: EvalArguments, *, command: str) -> None:
    """Finds what lets a run hold further, and writes a run that has it; prints the loss before and after.

    Methods:
        uniform: one factor of all attention logits. For each length the one with the least loss, from a grid and then
            golden-section search to 0.01; the run gets that of the longest. It is for NoPE: RoPE it does not help.
        head: one factor per layer and head, learned by Adam, starting at the best uniform one for the longest length.
            Each update reads windows of one length; the lengths take turns, and the last update has the longest.
            With `settings.focus` every factor is kept at 1 or above ("focus constraint").
        log-n: max(1, log_L n) for a query that sees n keys, L the training length. Nothing is learned.
        ssmax: s·ln n with s per layer and head, learned as in `head` from a multiple of 1/ln L on. The focus constraint
            does not apply to it, whose factors are below 1 for the first queries in any case.
        linear, ntk, dynamic, yarn: a scaling of RoPE by the longest length over L, in every layer that has RoPE, be it
            within a wrapper. Nothing is learned.

    `options.out` becomes a workdir: config.json with the new encoding, a checkpoint of the parameters alone at the step
    of the source, tune.json with what was found, and tune.jsonl with a line per update of a learned method. Whatever
    stops it, what was found until then is in the last two, and the same command starts anew.

    Args:
        options: one workdir; `lengths` in tokens; `settings` a `TuneConfig`; overrides of data.* decide what is read.
        command: what the user typed, for tune.json.

    Raises:
        ValueError: several workdirs, `out` holds a run, the run or its documents do not reach a length, or the encoding
            cannot be tuned by this method.
        OSError: `out` cannot be written.
        FloatingPointError: the loss is not finite at any factor, or does not stay finite while factors are learned.
    """
    job = _plan(options)
    job.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=job.out).close()
    (job.out / "tune.jsonl").unlink(missing_ok=True)  # of an attempt that was interrupted
    outcomes = {length: Outcome(length, len(job.documents[length])) for length in job.lengths}
    found: dict[str, Any] = {
        "method": job.method,
        "source": str(job.workdir),
        "command": command,
        "data": job.config.data.source,
        "train_length": job.train_length,
        "settings": dataclasses.asdict(job.settings),
    }

    def keep() -> None:
        _write_json(job.out / "tune.json", {**found, "lengths": list(map(dataclasses.asdict, outcomes.values()))})

    tuner = _Tuner(job)
    with tuner.progress, contextlib.ExitStack() as stack:
        stack.callback(keep)  # whatever has been found when this ends, for whatever reason
        tuner.describe("loading")
        source, model, step = load_model(job.workdir, tuner.mesh)
        found["step"] = step
        for length, outcome in outcomes.items():
            tuner.describe(f"before, at {length:,}")
            outcome.loss_before = tuner.loss(model, length)

        factors: dict[str, np.ndarray] = {}
        if job.method == "uniform":
            for length, outcome in outcomes.items():
                outcome.factor, outcome.loss_at_factor = tuner.search(model, length)
                keep()
            found["factor"] = outcomes[job.lengths[-1]].factor
        elif job.method in LEARNED:
            learned = tuner.learn(model, found)
            factors = {LEARNED[job.method]: learned}

        encoding = _new_encoding(job.config, job.method, job.lengths, factor=found.get("factor", 1.0))
        found["encoding"] = encoding_name(encoding)
        tuned = _with_encoding(source.model, encoding, model, tuner.mesh, factors)
        for length, outcome in outcomes.items():
            tuner.describe(f"after, at {length:,}")
            outcome.loss_after = tuner.loss(tuned, length)
        with Checkpointer(job.out) as checkpointer:
            checkpointer.save(step, {"params": nnx.state(tuned)})
        # What makes a workdir of it comes last, so that there is never one without parameters.
        configs.save(dataclasses.replace(source, model=tuned.config), job.out)
        tuner.finish()
    _print(job, list(outcomes.values()), found)


# The plan


def _plan(options: EvalArguments) -> Job:
    """Finds out all that can be wrong before anything large is loaded or computed."""
    method = options.method or "uniform"
    if len(options.workdirs) != 1:
        raise ValueError(f"--workdirs: tune takes one run, not {len(options.workdirs)}")
    for field in options.overrides:
        if field.startswith("eval."):
            raise ValueError(f"--{field} changes nothing about tune, which goes by --tune.* and --data.*")
    (workdir,), lengths = options.workdirs, tuple(sorted(set(options.lengths)))
    config = configs.override(configs.load(workdir), options.overrides)
    if (options.out / "config.json").exists() or any((options.out / "checkpoints").glob("*")):
        raise ValueError(f"--out {options.out} holds a run already; choose another")
    newest_step(workdir, config)
    max_length = nnx.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))).max_length
    if max_length is not None and lengths[-1] > max_length:
        raise ValueError(
            f"--lengths: {workdir} cannot read {lengths[-1]} tokens, its {encoding_name(config.model.encoding)} "
            f"encoding has {max_length} positions"
        )
    _try(dataclasses.replace(config.model, encoding=_new_encoding(config, method, lengths)), method)

    corpus = load_corpus(config.data, "train")
    reached = {length: int((corpus.lengths > length).sum()) for length in lengths}
    for length in lengths:
        if not reached[length]:
            raise ValueError(
                f"--lengths: no training document of {config.data.source} reaches length {length}, which takes "
                f"{length + 1} tokens; documents that reach {', '.join(f'{n}: {r}' for n, r in reached.items())}; the "
                f"longest has {corpus.lengths.max(initial=0)} tokens"
            )
    documents = choose_documents(corpus.lengths, lengths, options.settings.documents, options.settings.seed)
    return Job(workdir, options.out, config, method, lengths, options.settings, corpus, documents)


def _try(config: ModelConfig, method: str) -> None:
    """Has the tuned model looked at without computing it: what its encoding refuses, it refuses here."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    try:
        jax.eval_shape(lambda tokens: Decoder(config, rngs=nnx.Rngs(0)).hidden(tokens)[0], tokens)
    except ValueError as error:
        raise ValueError(f"--method {method}: {error}") from error


# Encodings


def _new_encoding(config: Config, method: str, lengths: Sequence[int], factor: float = 1.0) -> EncodingSpec:
    """The encoding of the tuned run: one of a period as long as before.

    Args:
        config: of the run.
        method: how it is tuned.
        lengths: the target lengths, ascending.
        factor: of `UniformScale`.

    Raises:
        ValueError: there is no RoPE to scale, or nothing to scale it by; or a layer has this wrapper already.
    """
    encodings, train_length = resolve(config.model.encoding), config.model.train_length
    assert train_length is not None  # Config fills it in
    if method in ("log-n", "ssmax") and train_length < 2:
        raise ValueError(f"--method {method} needs a run whose model.train_length is at least 2, not {train_length}")
    wrappers: dict[str, tuple[type[Wrapper], dict[str, Any]]] = {
        "uniform": (UniformScale, {"factor": factor}),
        "head": (HeadScale, {}),
        "log-n": (LogN, {"length": train_length}),
        "ssmax": (SSMax, {"start": 1 / math.log(max(2, train_length))}),
    }
    if method in wrappers:
        wrapper, settings = wrappers[method]
        for encoding in encodings:
            if any(isinstance(inner, wrapper) for inner in _nested(encoding)):
                raise ValueError(
                    f"--method {method}: the run has {wrapper.__name__} already, which is not put around itself; tune "
                    "the run that it came from"
                )
        changed: tuple[Encoding, ...] = tuple(wrapper(encoding, **settings) for encoding in encodings)
    else:
        if lengths[-1] <= train_length:
            raise ValueError(
                f"--method {method} stretches RoPE to the longest of --lengths, which must be above the training "
                f"length {train_length}, not {lengths[-1]}"
            )
        scaling = _scaling(method, lengths[-1] / train_length, train_length)
        changed = tuple(_scaled(encoding, scaling, method) for encoding in encodings)
        if changed == encodings:
            raise ValueError(
                f"--method {method} scales RoPE, but no layer of the run has it: its encoding is "
                f"{encoding_name(config.model.encoding)}"
            )
    return changed if len(changed) > 1 else changed[0]


def _nested(encoding: Encoding) -> Iterator[Encoding]:
    """An encoding and those within it, the outermost first."""
    yield encoding
    if isinstance(encoding, Wrapper):
        yield from _nested(encoding.encoding)


def _scaling(method: str, factor: float, train_length: int) -> RotaryScaling:
    match method:
        case "linear":
            return LinearScaling(factor)
        case "ntk":
            return NTKScaling(factor)
        case "dynamic":
            return DynamicNTKScaling(factor, original_length=train_length)
        case "yarn":
            return YaRNScaling(factor, original_length=train_length)
    raise ValueError(f"--method {method} is none of uniform, head, log-n, ssmax, linear, ntk, dynamic, yarn")


def _scaled(encoding: Encoding, scaling: RotaryScaling, method: str) -> Encoding:
    """The encoding with its RoPE, wherever it is, scaled; itself where there is none."""
    if isinstance(encoding, RoPE):
        if encoding.scaling is not None:
            raise ValueError(
                f"--method {method}: the RoPE of the run has {type(encoding.scaling).__name__} already; tune the run "
                "that it came from"
            )
        return dataclasses.replace(encoding, scaling=scaling)
    if isinstance(encoding, Wrapper):
        return dataclasses.replace(encoding, encoding=_scaled(encoding.encoding, scaling, method))
    return encoding


def _with_encoding(
    config: ModelConfig,
    encoding: EncodingSpec,
    donor: Decoder,
    mesh: Mesh,
    factors: Mapping[str, Float[np.ndarray, "L N"]],
) -> Decoder:
    """The donor with another encoding around the same cores; `factors` are what the wrappers have learned, by name."""
    model = nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, encoding=encoding), rngs=nnx.Rngs(0)))
    adopt_weights(model, donor)
    for slot, block in enumerate(model.blocks):
        position = block.attention.position
        for name, values in factors.items():
            rows = np.asarray(values, np.float32)[slot :: len(model.blocks)]
            position[name] = position[name].replace(jnp.asarray(rows))
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jax.device_put, state, state_shardings(state, mesh)))


# Losses


def _total_nll(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, temperature: Any) -> Float[Array, ""]:
    """The mean loss of each row, summed over the rows that count."""
    tokens, targets, weights = map(jnp.asarray, batch)
    model = nnx.merge(graphdef, state)
    hidden, _ = model.hidden(tokens, temperature=temperature)
    return jnp.vdot(weights, model.nll(hidden, targets).mean(-1))


_judge = jax.jit(_total_nll, static_argnums=0)


_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))
"""AdamW of Wang et al., who let no weights decay; without the learning rate."""


@functools.partial(jax.jit, static_argnums=0)
def _update(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    factors: Float[Array, "L N"],
    opt_state: Any,
    batch: Batch,
    learning_rate: float,
    least: float,
) -> tuple[Float[Array, "L N"], Any, dict[str, Array]]:
    """One update of the factors alone, which are kept at `least` or above: factors, optimizer state and metrics."""
    rows = batch.weights.sum()
    loss, grads = jax.value_and_grad(lambda factors: _total_nll(graphdef, state, batch, factors) / rows)(factors)
    updates, opt_state = _ADAM.update(grads, opt_state)
    factors = jnp.maximum(factors - learning_rate * updates, least)
    metrics = {"loss": loss, "grad_norm": jnp.linalg.norm(grads)}
    metrics |= {"least": factors.min(), "mean": factors.mean(), "most": factors.max()}
    return factors, opt_state, metrics


def _learning_rate(settings: TuneConfig, step: int) -> float:
    """Up linearly over the warm-up, then along a cosine to a tenth; the first update already moves, as in training."""
    warmup = (step + 1) / max(1, settings.warmup_steps)
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * min(warmup, 0.55 + 0.45 * math.cos(math.pi * min(max(progress, 0), 1)))


# Searches


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = _TOLERANCE) -> float:
    """Where a function with one minimum between `low` and `high` has it, to within `tolerance` (Kiefer 1953)."""
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


def best_factor(loss: Callable[[float], float]) -> tuple[float, float]:
    """The factor with the least loss of all that were tried, 1 among them, and that loss.

    Tried are steps of 0.2 from 0.8 to 2.4, further out to 0.2 and to 4 as long as the outermost is the best, and then
    between the neighbours of the best one by golden section, to 0.01.

    Raises:
        FloatingPointError: the loss is not finite for any of them.
    """
    seen: dict[float, float] = {}

    def at(factor: float) -> float:
        if factor not in seen:
            value = loss(factor)
            seen[factor] = value if math.isfinite(value) else math.inf
        return seen[factor]

    def order(factor: float) -> tuple[float, float]:
        return at(factor), abs(factor - 1)  # where nothing is gained, nothing is changed

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


class _Tuner:
    """Computes losses, factors and their progress for one job."""

    def __init__(self, job: Job):
        self.job = job
        self.mesh = make_mesh(MeshConfig())
        # Rounded up to what divides over the devices; rows in excess do not count.
        devices = self.mesh.shape["data"]
        self._rows = -(-job.settings.batch_size // devices) * devices
        self._batches: dict[int, list[Batch]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))
        self._bar = self.progress.add_task("", total=self._work())

    def _work(self) -> int:
        """Tokens that will be read: an estimate, as the search for a factor may go on further out."""
        job = self.job
        once = {length: len(job.documents[length]) * length for length in job.lengths}
        search = _LAST - _FIRST + 1 + math.ceil(math.log(_TOLERANCE * _STEPS_PER_UNIT / 2) / math.log(0.618))
        total = 2 * sum(once.values())
        if job.method == "uniform":
            total += search * sum(once.values())
        elif job.method in LEARNED:
            total += search * once[job.lengths[-1]] if job.settings.start == "uniform" else 0
            total += sum(self._cost(step) for step in range(job.settings.steps))
        return total

    def _cost(self, step: int) -> int:
        # Forward, once more as nothing is kept, and backward, which costs as much as two.
        return 4 * self.job.settings.batch_size * self._length(step)

    def _length(self, step: int) -> int:
        """The length of an update: they take turns, counted so that the last update has the longest."""
        return self.job.lengths[(step - self.job.settings.steps) % len(self.job.lengths)]

    def describe(self, words: str) -> None:
        self.progress.update(self._bar, description=words)

    def finish(self) -> None:
        self.progress.update(self._bar, description="tuned", completed=self._work(), total=self._work())

    def loss(self, model: Decoder, length: int, factor: float = 1.0) -> float:
        """The loss at a length, over the job's documents from their starts."""
        if length not in self._batches:
            windows = [self._window(int(index), 0, length) for index in self.job.documents[length]]
            self._batches[length] = [
                self._place(windows[i : i + self._rows]) for i in range(0, len(windows), self._rows)
            ]
        graphdef, state = nnx.split(model)
        total = sum(float(_judge(graphdef, state, batch, factor)) for batch in self._batches[length])
        self.progress.advance(self._bar, len(self.job.documents[length]) * length)
        return total / len(self.job.documents[length])

    def search(self, model: Decoder, length: int, unit: float = 1.0) -> tuple[float, float]:
        """The best uniform factor at a length, in units of `unit`, and its loss."""

        def loss(factor: float) -> float:
            self.describe(f"factor {factor:.2f}, at {length:,}")
            return self.loss(model, length, factor * unit)

        return best_factor(loss)

    def learn(self, model: Decoder, found: dict[str, Any]) -> Float[np.ndarray, "L N"]:
        """Learns a factor per layer and head; notes in `found` where they begin and what they are so far."""
        job, settings, unit = self.job, self.job.settings, 1.0
        if job.method == "ssmax":
            # A temperature multiplies s·ln n, so that with s = 1 it takes the place of s.
            encoding = _new_encoding(job.config, job.method, job.lengths)
            ones = np.ones((job.config.model.num_layers, job.config.model.num_heads))
            model = _with_encoding(job.config.model, encoding, model, self.mesh, {LEARNED["ssmax"]: ones})
            unit = 1 / math.log(job.train_length)
        start = 1.0
        if settings.start == "uniform":
            start, _ = self.search(model, job.lengths[-1], unit)
        found["start"] = start * unit
        least = 1.0 if settings.focus and job.method == "head" else -math.inf

        # Windows longer than those of training need more memory than it did: layers are computed again instead.
        remat = dataclasses.replace(model.config, remat=True)
        graphdef = nnx.split(nnx.eval_shape(lambda: Decoder(remat, rngs=nnx.Rngs(0))))[0]
        state = nnx.state(model)
        factors = jnp.full((model.config.num_layers, model.config.num_heads), max(start * unit, least), jnp.float32)
        opt_state = _ADAM.init(factors)
        with (job.out / "tune.jsonl").open("w", encoding="utf-8") as file:
            for step in range(settings.steps):
                length, rate = self._length(step), _learning_rate(settings, step)
                self.describe(f"update {step + 1} of {settings.steps}")
                batch = self._draw(step, length)
                new, opt_state, metrics = _update(graphdef, state, factors, opt_state, batch, rate, least)
                values = {name: float(value) for name, value in metrics.items()}
                for name in "loss", "grad_norm":
                    if not math.isfinite(values[name]):
                        raise FloatingPointError(
                            f"{name} is {values[name]} at update {step + 1}; a smaller --tune.learning_rate may help"
                        )
                factors = new
                found["updates"], found["factors"] = step + 1, np.asarray(factors).tolist()
                line = {"step": step + 1, "length": length, "learning_rate": rate, **values}
                file.write(json.dumps(line) + "\n")
                file.flush()
                self.progress.advance(self._bar, self._cost(step))
        return np.asarray(factors)

    def _draw(self, step: int, length: int) -> Batch:
        """The batch of an update: windows anywhere in any documents that reach the length."""
        random = np.random.default_rng((self.job.settings.seed, step))
        lengths = self.job.corpus.lengths
        indices = random.choice(np.flatnonzero(lengths > length), self.job.settings.batch_size)
        starts = random.integers(lengths[indices] - length)
        windows = [self._window(int(i), int(start), length) for i, start in zip(indices, starts, strict=True)]
        return self._place(windows)

    def _window(self, index: int, start: int, length: int) -> Int[np.ndarray, "T+1"]:
        # Not by way of the document, which may be the whole corpus.
        first = int(self.job.corpus.offsets[index]) + start
        return self.job.corpus.tokens[first : first + length + 1].astype(np.int32)

    def _place(self, windows: Sequence[np.ndarray]) -> Batch:
        rows = np.zeros((self._rows, len(windows[0])), np.int32)
        rows[: len(windows)] = windows
        weights = (np.arange(self._rows) < len(windows)).astype(np.float32)[:, None]
        return place_batch(Batch(rows[:, :-1], rows[:, 1:], weights), self.mesh)


# Results


def wang_fit(stretch: float) -> float:
    """The factor that Wang et al. 2024 (arXiv 2404.12224) fit for `stretch` times the training length."""
    return 1 + 0.397 * math.log(stretch)


def _write_json(path: Path, value: Any) -> None:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        if isinstance(value, list):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN

    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")


def _print(job: Job, outcomes: Sequence[Outcome], found: Mapping[str, Any]) -> None:
    uniform = job.method == "uniform"
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    grid = Table(box=SIMPLE_HEAD)
    header = ["length", "documents", "before"]
    header += ["best factor", "Wang's fit", "with the best"] if uniform else []
    for name in (*header, "of the new run"):
        grid.add_column(name, justify="right")
    for outcome in outcomes:
        stretch = outcome.length / job.train_length
        row = [f"{outcome.length:,}", str(outcome.documents), f"{outcome.loss_before:.4f}"]
        if uniform:
            fit = f"{wang_fit(stretch):.2f}" if stretch >= 1 else "-"
            row += [f"{outcome.factor:.2f}", fit, f"{outcome.loss_at_factor:.4f}"]
        grid.add_row(*row, f"{outcome.loss_after:.4f}")
    console.print(f"Loss of {job.workdir} in nats per token, tuned by {job.method}")
    console.print(grid)
    for note in _notes(job, found):
        console.print(note)


def _notes(job: Job, found: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Mean loss over all tokens of documents of the training split of {job.config.data.source}, read from their "
        "starts."
    ]
    if job.method == "uniform":
        notes.append(
            f"The new run has the factor of the longest length, {found['factor']:.2f}. Wang's fit is 1 + 0.397 ln s at "
            "s times the training length (arXiv 2404.12224)."
        )
    if job.method in LEARNED:
        factors = np.array(found["factors"])
        notes.append(
            f"Factors began at {found['start']:.3f}, and are now {factors.min():.3f} to {factors.max():.3f}, "
            f"{factors.mean():.3f} on average."
        )
    if job.method == "ssmax":
        notes.append("They are s in s ln n, to which the focus constraint does not apply.")
    notes.append(f"Written to {job.out}: a workdir for eval.py, or for train.start_from.")
    return notes
