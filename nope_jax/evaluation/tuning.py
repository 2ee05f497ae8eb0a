"""What lets a trained run hold past its training length: factors of its attention logits, or a scaling of its RoPE.

Factors are those of Wang et al. 2024 (arXiv 2404.12224): one for all heads (`UniformScale`), or one per layer and head
that is learned while all else is frozen (`HeadScale`, `SSMax`). They are found on documents of the training split, by
the loss at the target length: the mean over all of a window's tokens, each predicted from all those before it.

Shapes: B batch, T length, L layers, N query heads. Losses in nats per token.
"""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

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
from nope_jax.errors import is_refusal
from nope_jax.evaluation import report, tuned
from nope_jax.evaluation.console import print_table, progress_bar
from nope_jax.evaluation.files import replace_file
from nope_jax.evaluation.protocol import choose_documents
from nope_jax.evaluation.run import encoding_name, newest_step, result_identity
from nope_jax.evaluation.tuned import Learned, Outcome, Tuning
from nope_jax.locks import held
from nope_jax.models import Decoder, transfer_weights
from nope_jax.sharding import make_mesh, place_batch, state_shardings

LEARNED = {"head": "head_scale", "ssmax": "ssmax"}
"""The methods that learn a factor per layer and head, and the parameter of a layer that holds them."""

# Uniform factors are tried in steps of 0.2: those from 0.8 to 2.4, and further out where the best is an outermost.
_STEPS_PER_UNIT = 5
_FIRST, _LAST = 4, 12
_LEAST, _MOST = 1, 20
_TOLERANCE = 0.01
_KEPT_EVERY = 10
"""Updates of learned factors between two writes of tune.json."""


class Batch(NamedTuple):
    """Rows of one length, each a window of a document."""

    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    targets: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    weights: Float[Array, "B 1"] | Float[np.ndarray, "B 1"]
    """1; 0 for a row that only fills up the devices."""


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

    def content(self, step: int) -> str:
        """A digest of the run's checkpoint, of code and of the documents: it changes when they do."""
        identity = result_identity(self.workdir, self.config, step, self.config.data.tokenizer)
        digest = hashlib.sha256(identity.encode() + self.corpus.lengths.tobytes())
        for length, indices in self.documents.items():
            for index in indices:
                digest.update(self.window(int(index), 0, length).tobytes())
        return digest.hexdigest()

    def window(self, index: int, start: int, length: int) -> Int[np.ndarray, "{length}+1"]:
        """Tokens of a document, and the last one's target."""
        # Not by way of the document, which may be the whole corpus.
        return self.corpus.read(index, start, start + length + 1)


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
        linear, ntk, yarn: a scaling of RoPE by the longest length over L, in every layer that has RoPE, be it within a
            wrapper. Nothing is learned.
        dynamic: NTK-aware scaling by n/L at each length n, which is dynamic NTK with s = 1: with a larger s its
            s·n/L - (s-1) is more than n/L asks for, at the longest length s² - s + 1 in place of s.

    `options.out` becomes a workdir: config.json with the new encoding, a checkpoint of the parameters alone at the step
    of the source; tune.json with all that was found, and tune.jsonl with a line per update of a learned method; and to
    look at, tune.csv, tune.png and report.html. Whatever stops it, what was found until then is in these but for the
    first two, and the same command goes on from there: with the same result, to the bit, as if never stopped.

    Args:
        options: one workdir; `lengths` in tokens; `settings` a `TuneConfig`; overrides of data.* decide what is read.
        command: what the user typed, for tune.json and the report.

    Raises:
        ValueError: several workdirs, `out` holds a run or what another tuning has left or is being written by one, the
            run or its documents do not reach a length, or the encoding cannot be tuned by this method.
        OSError: `out` cannot be written.
        FloatingPointError: the loss is not finite at any factor, or does not stay finite while factors are learned.
    """
    job = _plan(options)
    job.out.mkdir(parents=True, exist_ok=True)
    with held(job.out):
        _find_and_write(job, command)


def _find_and_write(job: Job, command: str) -> None:
    mesh = make_mesh(MeshConfig())
    source, model, step = load_model(job.workdir, mesh)
    tuning = _begin(job, step, command).or_continued(job.out)
    tempfile.TemporaryFile(dir=job.out).close()
    tuner = _Tuner(job, tuning, mesh)
    end = f"Not finished: the same command goes on from what is in {job.out}."
    try:
        with tuner.progress:
            tuned_config = tuner.find(source, model)
        end = f"Written to {job.out}: a workdir for eval.py, or for train.init_from; see report.html there."
    except FloatingPointError:
        end = f"Diverged: what was found until then is in {job.out}; other settings take another --out."
        raise
    finally:
        if tuning.lengths[0].loss_before is not None:
            _show(job.out, tuning, end)
    # What makes a workdir of it comes last, so that there is never one that lacks something.
    configs.save(tuned_config, job.out)


def _begin(job: Job, step: int, command: str) -> Tuning:
    return Tuning(
        method=job.method,
        source=str(job.workdir),
        data=job.config.data.source,
        train_length=job.train_length,
        settings=dataclasses.asdict(job.settings),
        content=job.content(step),
        lengths=[Outcome(length, len(job.documents[length])) for length in job.lengths],
        command=command,
        step=step,
    )


def _show(out: Path, tuning: Tuning, end: str) -> None:
    """Keeps, draws and prints what was found, and in the end how it ended."""
    tuning.keep(out)
    tuned.write_table(out / "tune.csv", tuning)
    tuned.plot(out / "tune.png", tuning, tuned.read_updates(out))
    report.add_section(out, "tune", tuned.section(out, tuning))
    print_table(tuned.title(tuning), tuned.header(tuning), tuned.rows(tuning), *tuned.notes(tuning), end, names=0)


# The plan


def _plan(options: EvalArguments) -> Job:
    """Finds out all that can be wrong before anything large is loaded or computed."""
    method = options.method or "uniform"
    if len(options.workdirs) != 1:
        raise ValueError(f"--workdirs: tune takes one run, not {len(options.workdirs)}")
    (workdir,), lengths = options.workdirs, tuple(sorted(set(options.lengths)))
    config = configs.override(configs.load(workdir), options.overrides)
    unfinished = (options.out / "tune.json").exists() and not (options.out / "config.json").exists()
    if not unfinished and any((options.out / name).exists() for name in ("config.json", "checkpoints")):
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
    settings = options.settings
    documents = choose_documents(corpus.lengths, lengths, settings.documents, settings.seed, split="training")
    return Job(workdir, options.out, config, method, lengths, settings, corpus, documents)


def _try(config: ModelConfig, method: str) -> None:
    """Has the tuned model looked at without computing it: what its encoding refuses, it refuses here."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    try:
        jax.eval_shape(lambda tokens: Decoder(config, rngs=nnx.Rngs(0)).hidden(tokens)[0], tokens)
    except ValueError as error:
        if not is_refusal(error):
            raise
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
            return DynamicNTKScaling(1.0, original_length=train_length)  # grows as n/L, whatever the longest
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
    source: Decoder,
    mesh: Mesh,
    factors: Mapping[str, Float[np.ndarray, "L N"]],
) -> Decoder:
    """The source with another encoding around the same cores; `factors` are what the wrappers have learned, by name."""
    model = nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, encoding=encoding), rngs=nnx.Rngs(0)))
    transfer_weights(model, source)
    for slot, block in enumerate(model.blocks):
        position = block.attention.position
        for name, values in factors.items():
            rows = np.asarray(values, np.float32)[slot :: len(model.blocks)]
            position[name] = position[name].replace(jnp.asarray(rows))
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jax.device_put, state, state_shardings(state, mesh)))


# Losses


def _row_nll(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, logit_scale: Any) -> Float[Array, "B"]:
    """The mean loss of each row, 0 for one that does not count."""
    tokens, targets, weights = map(jnp.asarray, batch)
    model = nnx.merge(graphdef, state)
    hidden, _ = model.hidden(tokens, logit_scale=logit_scale)
    return weights[:, 0] * model.nll(hidden, targets).mean(-1)


_judge = jax.jit(_row_nll, static_argnums=0)


_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))
"""AdamW of Wang et al., who let no weights decay; without the learning rate."""


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
    """One update of the factors alone, which are kept at `least` or above: factors, optimizer state and metrics."""
    rows = batch.weights.sum()
    loss, grads = jax.value_and_grad(lambda factors: _row_nll(graphdef, state, batch, factors).sum() / rows)(factors)
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


def _reopened(path: Path, lines: int) -> TextIO:
    """A file to append to, with so many of its first lines; a later one is of an update that was not kept."""
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines] if lines else []
    with replace_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


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


def best_factor(loss: Callable[[float], float], seen: dict[float, float] | None = None) -> tuple[float, float]:
    """The factor with the least loss of all that were tried, 1 among them, and that loss.

    Tried are steps of 0.2 from 0.8 to 2.4, further out to 0.2 and to 4 as long as the outermost is the best, and then
    between the neighbours of the best one by golden section, to 0.01.

    Args:
        loss: of a factor.
        seen: takes in the loss of every factor tried, infinite where it is not finite; those in it are not asked again.

    Raises:
        FloatingPointError: the loss is not finite for any of them.
    """
    seen = {} if seen is None else seen

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
    """Does the computing of one job, and tells how far it is."""

    def __init__(self, job: Job, tuning: Tuning, mesh: Mesh):
        self.job, self.tuning, self.mesh = job, tuning, mesh
        # Rounded up to what divides over the devices; rows in excess do not count.
        devices = self.mesh.shape["data"]
        self._rows = -(-job.settings.batch_size // devices) * devices
        self._batches: dict[int, list[Batch]] = {}
        self.progress = progress_bar()
        self._bar = self.progress.add_task("", total=self._work())

    def find(self, source: Config, model: Decoder) -> Config:
        """Fills in the tuning from where it stands, and writes the run that it leads to."""
        job, tuning = self.job, self.tuning
        for outcome in tuning.lengths:
            if outcome.loss_before is None:
                self._describe(f"before, at {outcome.length:,}")
                outcome.loss_before = outcome.keep("before", self.losses(model, outcome.length))
                tuning.keep(job.out)

        learned: dict[str, np.ndarray] = {}
        if job.method == "uniform":
            for outcome in tuning.lengths:
                self._search(model, outcome)
            tuning.factor = tuning.lengths[-1].factor
        elif job.method in LEARNED:
            learned = {LEARNED[job.method]: self._learn(model)}

        encoding = _new_encoding(job.config, job.method, job.lengths, factor=tuning.factor or 1.0)
        tuning.encoding = encoding_name(encoding)
        new = _with_encoding(source.model, encoding, model, self.mesh, learned)
        for outcome in tuning.lengths:
            self._describe(f"after, at {outcome.length:,}")
            outcome.loss_after = outcome.keep("after", self.losses(new, outcome.length))
        shutil.rmtree(job.out / "checkpoints", ignore_errors=True)  # of an attempt that was stopped right here
        with Checkpointer(job.out) as checkpointer:
            checkpointer.save(tuning.step, {"params": nnx.state(new)})
        if tuning.learned is not None:
            tuning.learned = dataclasses.replace(tuning.learned, optimizer=None)
        self.progress.update(self._bar, description="tuned", completed=self._work(), total=self._work())
        return dataclasses.replace(source, model=new.config)

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

    def _describe(self, words: str) -> None:
        self.progress.update(self._bar, description=words)

    def losses(self, model: Decoder, length: int, factor: float = 1.0) -> Float[np.ndarray, "documents"]:
        """The loss at a length, of each of the job's documents from its start."""
        if length not in self._batches:
            windows = [self.job.window(int(index), 0, length) for index in self.job.documents[length]]
            self._batches[length] = [
                self._place(windows[i : i + self._rows]) for i in range(0, len(windows), self._rows)
            ]
        graphdef, state = nnx.split(model)
        rows = [np.asarray(_judge(graphdef, state, batch, factor), np.float64) for batch in self._batches[length]]
        count = len(self.job.documents[length])
        self.progress.advance(self._bar, count * length)
        return np.concatenate(rows)[:count]

    def _search(self, model: Decoder, outcome: Outcome, unit: float = 1.0) -> float:
        """Finds the best uniform factor at a length, in units of `unit`."""
        self.progress.advance(self._bar, len(outcome.tried) * outcome.documents * outcome.length)

        def loss(factor: float) -> float:
            self._describe(f"factor {factor:.2f}, at {outcome.length:,}")
            self.tuning.keep(self.job.out)
            return outcome.keep(str(factor), self.losses(model, outcome.length, factor * unit))

        outcome.factor, outcome.loss_at_factor = best_factor(loss, outcome.tried)
        return outcome.factor

    def _learn(self, model: Decoder) -> Float[np.ndarray, "L N"]:
        """Learns a factor per layer and head, from as many updates on as have been made."""
        job, settings, tuning, unit = self.job, self.job.settings, self.tuning, 1.0
        if job.method == "ssmax":
            # A logit scale multiplies s·ln n, so that with s = 1 it takes the place of s.
            encoding = _new_encoding(job.config, job.method, job.lengths)
            ones = np.ones((job.config.model.num_layers, job.config.model.num_heads))
            model = _with_encoding(job.config.model, encoding, model, self.mesh, {LEARNED["ssmax"]: ones})
            unit = 1 / math.log(job.train_length)
        start = self._search(model, tuning.lengths[-1], unit) if settings.start == "uniform" else 1.0
        least = 1.0 if settings.focus and job.method == "head" else -math.inf
        tuning.start = max(start * unit, least)

        # Windows longer than those of training need more memory than it did: layers are computed again instead.
        remat = dataclasses.replace(model.config, remat=True)
        graphdef = nnx.split(nnx.eval_shape(lambda: Decoder(remat, rngs=nnx.Rngs(0))))[0]
        state = nnx.state(model)
        factors = jnp.full((model.config.num_layers, model.config.num_heads), tuning.start, jnp.float32)
        opt_state = _ADAM.init(factors)
        done = 0
        if tuning.learned is not None:
            done, factors = tuning.learned.updates, jnp.asarray(tuning.learned.factors, factors.dtype)
            leaves, structure = jax.tree.flatten(opt_state)
            kept = zip(tuning.learned.optimizer or leaves, leaves, strict=True)
            opt_state = jax.tree.unflatten(structure, [jnp.asarray(value, leaf.dtype) for value, leaf in kept])
        self.progress.advance(self._bar, sum(map(self._cost, range(done))))
        with _reopened(job.out / "tune.jsonl", done) as file:
            for step in range(done, settings.steps):
                length, rate = self._length(step), _learning_rate(settings, step)
                self._describe(f"update {step + 1} of {settings.steps}")
                batch = self._draw(step, length)
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
                # As numbers of JSON, which gives a float back to the bit.
                numbers, *leaves = (np.asarray(leaf).tolist() for leaf in (factors, *jax.tree.leaves(opt_state)))
                tuning.learned = Learned(step + 1, numbers, leaves)
                if (step + 1) % _KEPT_EVERY == 0:
                    tuning.keep(job.out)
                self.progress.advance(self._bar, self._cost(step))
        return np.asarray(factors)

    def _draw(self, step: int, length: int) -> Batch:
        """The batch of an update: windows anywhere in any documents that reach the length."""
        random = np.random.default_rng((self.job.settings.seed, step))
        lengths = self.job.corpus.lengths
        indices = random.choice(np.flatnonzero(lengths > length), self.job.settings.batch_size)
        starts = random.integers(lengths[indices] - length)
        windows = [self.job.window(int(i), int(start), length) for i, start in zip(indices, starts, strict=True)]
        return self._place(windows)

    def _place(self, windows: Sequence[np.ndarray]) -> Batch:
        rows = np.zeros((self._rows, len(windows[0])), np.int32)
        rows[: len(windows)] = windows
        weights = (np.arange(self._rows) < len(windows)).astype(np.float32)[:, None]
        return place_batch(Batch(rows[:, :-1], rows[:, 1:], weights), self.mesh)
