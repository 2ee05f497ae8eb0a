"""LongPPL: perplexity over the tokens that need the long context (Fang et al. 2024, arXiv 2410.23771).

A judge reads each document twice: from its start, and in short contexts. Key tokens are those whose loss the long
context lowers by more than `gain`, to less than `loss`. LongPPL is the perplexity of a run over them, given the long
context. The short contexts are those of the paper's code: `step` consecutive tokens share one, which begins `short`
tokens before the first of them; the first `short` tokens of a document are never key tokens.

Shapes: D documents, W windows, R tokens of a row, B batch, T length. Losses are in nats.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from nope_jax.data.tokenizers import tokenizer_digest
from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.documents import VALIDATION, Documents, read_documents
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv, store, stored
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import (
    Run,
    cannot_read,
    checkpoint_step,
    find_runs,
    refuse_differing,
    refuse_length,
    result_identity,
)
from nope_jax.evaluation.common.uncertainty import Estimate, ratio
from nope_jax.evaluation.registry import LongpplConfig, Options
from nope_jax.paths import location
from nope_jax.sharding import to_host

SHARED = (*VALIDATION, "eval.documents", "eval.seed")
"""Config fields that must agree between runs."""
COLUMNS = (
    "run encoding train_length length documents tokens perplexity perplexity_stderr "
    "key_tokens longppl longppl_stderr judge"
)
"""Columns of longppl.csv, one row per run and length; standard errors are over documents."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """Losses of one run at one length, summed over each document."""

    nll: Float[np.ndarray, "D"]
    tokens: Int[np.ndarray, "D"]
    key_nll: Float[np.ndarray, "D"]
    key_tokens: Int[np.ndarray, "D"]

    @property
    def perplexity(self) -> Estimate:
        return ratio(self.nll[:, None], self.tokens[:, None])[0].exp()

    @property
    def longppl(self) -> Estimate:
        """NaN without key tokens."""
        return ratio(self.key_nll[:, None], self.key_tokens[:, None])[0].exp()


def plan(options: Options) -> "LongPpl":
    """Plans LongPPL of each run at every length, on the same documents.

    Raises:
        ValueError: a run, the judge, a length or a corpus is invalid, or the runs cannot be compared.
    """
    settings: LongpplConfig = options.settings
    if options.lengths[0] < settings.short + settings.step:
        raise ValueError(
            f"--lengths must be at least --longppl.short + --longppl.step, {settings.short:,} + {settings.step:,}, not "
            f"{options.lengths[0]:,}, where no context is shorter than the document"
        )
    judged_by = None if settings.judge is None else location(settings.judge, "--longppl.judge")
    if judged_by is None or judged_by in options.workdirs:
        runs = find_runs(options, SHARED)
        judge = None if judged_by is None else runs[options.workdirs.index(judged_by)]
    else:
        *runs, judge = find_runs(
            options._replace(workdirs=(*options.workdirs, judged_by)), SHARED, at_newest=[judged_by]
        )
    if judge is not None:
        refuse_length([judge], options.lengths[-1])
        why = "; key tokens are those of one tokenizer, so --longppl.judge must have that of the runs"
        refuse_differing([*runs, judge], ["data.tokenizer"], why, content=tokenizer_digest)
        refuse_differing([*runs, judge], ["data.bos"], why)
    return LongPpl(runs, read_documents(runs), settings, judge)


@dataclasses.dataclass
class LongPpl(Evaluation):
    """LongPPL and perplexity; `Run.results` holds the losses of each run at each length."""

    runs: Sequence[Run[Losses]]
    documents: Sequence[Documents]
    """The documents that each run reads."""
    settings: LongpplConfig
    judge: Run[Losses] | None
    """None: each run judges for itself."""

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        each = zip(self.runs, self.documents, strict=True)
        bar.total(sum(len(documents[n]) * n for run, documents in each for n in run.possible))
        keys: dict[int, Bool[np.ndarray, "D T"]] = {}
        if self.judge is not None:
            self.judge.step = checkpoint_step(self.judge)
        for run, documents in zip(self.runs, self.documents, strict=True):
            run.step = checkpoint_step(run)
            for length in run.possible:
                path = _path(out, run, length)
                if (found := stored(path, Losses, self._identity(run, documents, length))) is not None:
                    run.results[length] = found
                    bar.advance(len(documents[length]) * length)
                    yield
            missing = [length for length in run.possible if length not in run.results]
            if not missing:
                continue
            if self.judge is not None and (unjudged := [length for length in missing if length not in keys]):
                bar.describe(f"{self.judge.name} judges")
                read = self._reader(self.judge)
                keys |= {length: self._keys(read, documents, length, run.config.data.bos)[0] for length in unjudged}
            bar.describe(f"{run.name}: loading")
            read = self._reader(run)
            for length in missing:
                bar.describe(f"{run.name} at {length:,}")
                if self.judge is None:
                    key, nll = self._keys(read, documents, length, run.config.data.bos)
                else:
                    key, nll = keys[length], read(self._tokens(documents, length))
                run.results[length] = Losses(
                    nll.sum(1), np.full(len(nll), length), np.where(key, nll, 0).sum(1), key.sum(1)
                )
                store(_path(out, run, length), run.results[length], self._identity(run, documents, length))
                bar.advance(len(nll) * length)
                yield

    def _reader(self, run: Run[Losses]) -> Callable[[np.ndarray], np.ndarray]:
        placement = run.place(run.config.eval.batch_size, math.gcd(*run.possible))
        model = run.load(placement.mesh)

        def read(tokens: np.ndarray) -> np.ndarray:
            with jax.set_mesh(placement.mesh):
                return losses(model, tokens, batch_size=placement.rows, place=placement.put)

        return read

    @staticmethod
    def _tokens(documents: Documents, length: int) -> Int[np.ndarray, "D {length}+1"]:
        return np.stack([document.tokens[: length + 1] for document in documents[length]]).astype(np.int32)

    def _keys(self, read: Callable[[np.ndarray], np.ndarray], documents: Documents, length: int, bos: bool):
        """Which tokens are key tokens to a judge, and its losses given the long context, [D, T]."""
        settings, tokens = self.settings, self._tokens(documents, length)
        windows, whose = short_windows(tokens, settings.short, settings.step, bos=bos)
        nll, short = read(tokens), read(windows)
        return key_tokens(nll, short, whose, settings), nll

    def _identity(self, run: Run[Losses], documents: Documents, length: int) -> str:
        judge, settings = self.judge or run, self.settings
        digest = hashlib.sha256(self._tokens(documents, length).tobytes()).hexdigest()
        judged = result_identity(judge, settings.short, settings.step, settings.gain, settings.loss)
        return result_identity(run, run.config.data.bos, length, digest, judged)

    def numbers(self) -> Mapping[str, Csv]:
        return {"longppl.csv": Csv(COLUMNS, self._csv_rows())}

    def _csv_rows(self) -> Iterator[tuple]:
        for run in self.runs:
            for length, found in sorted(run.results.items()):
                what = (run.name, run.encoding, run.train_length, length, len(found.tokens), int(found.tokens.sum()))
                plain, long = ((float(x.value), float(x.stderr)) for x in (found.perplexity, found.longppl))
                yield (*what, *plain, int(found.key_tokens.sum()), *long, (self.judge or run).name)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "longppl.png", draw(self.measured)

    def sections(self) -> list[Section]:
        header = ["run", "", "trained at", *(f"{length:,}" for length in self.runs[0].lengths)]
        section = Section(
            "LongPPL beside perplexity",
            "Perplexity over the tokens that need the long context, beside that over all tokens (Fang et al. 2024).",
            Table("LongPPL and perplexity by length", header, rows(self.measured)),
            self._notes(),
            figures={"longppl.png": "LongPPL (solid) and perplexity (dotted) of every run by length"},
            files={"longppl.csv": "one row per run and length, with standard errors over documents."},
        )
        return [section]

    def _notes(self) -> list[str]:
        settings = self.settings
        if self.judge is None:
            judged = (
                "Each run judged for itself, so the runs are measured on different tokens and none has a LongPPL "
                f"above exp({settings.loss:g}); compare runs under one --longppl.judge."
            )
        else:
            judged = f"The judge is {self.judge.name} at step {self.judge.step:,}, for all runs."
        return [
            *cannot_read(self.runs),
            f"Key tokens: those whose loss is more than {settings.gain:g} nats lower given the document from its start "
            f"than given a short context of {settings.short:,} to {settings.short + settings.step - 1:,} tokens, and "
            f"below {settings.loss:g} nats (the paper: 2 nats each, 4,096 to 5,119 tokens). {judged}",
            "Mean over the tokens of all documents ± its standard error over documents, (number of key tokens). Plain "
            "perplexity predicts long-context ability poorly, because few tokens need the long context.",
        ]


def _path(out: Path, run: Run[Losses], length: int) -> Path:
    return out / "measured" / f"longppl-{run.name.replace('/', '-')}-{length}.npz"


@functools.partial(jax.jit, static_argnums=0)
def _nll(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    model = nnx.merge(graphdef, state)
    return model.nll(model.hidden(tokens)[0], targets)


def losses(
    model: nnx.Module,
    tokens: Int[np.ndarray, "W R"],
    *,
    batch_size: int = 8,
    place: Callable[[tuple], tuple] = jax.device_put,
) -> Float[np.ndarray, "W R-1"]:
    """The loss of every token but the first of each row.

    Args:
        model: has `hidden(tokens [B, T])`, which returns a pair whose first element is the input of `nll`, and
            `nll(hidden, targets)`, which returns [B, T].
        tokens: rows of equal length.
        batch_size: rows per call of the model.
        place: puts a tuple of arrays [B, T] on the devices.
    """
    graphdef, state = nnx.split(model)
    found = []
    for first in range(0, len(tokens), batch_size):
        batch = tokens[first : first + batch_size]
        padded = np.resize(batch, (batch_size, tokens.shape[1]))  # the last batch is padded with its own rows
        nll = _nll(graphdef, state, *place((padded[:, :-1], padded[:, 1:])))
        found.append(to_host(nll).astype(np.float64)[: len(batch)])
    return np.concatenate(found)


def short_windows(
    tokens: Int[np.ndarray, "D R"], short: int, step: int, *, bos: bool = False
) -> tuple[Int[np.ndarray, "W {short}+{step}"], list[tuple[int, int]]]:
    """The short contexts of documents with the tokens that share each, padded at the end by the last token.

    Args:
        tokens: the documents.
        short: tokens of context before the first of the tokens that share it.
        step: number of tokens that share a context.
        bos: whether every window begins with the document's first token.

    Returns:
        The windows, and the document and first token of each.
    """
    size = tokens.shape[1]
    whose = [(i, start) for i in range(len(tokens)) for start in range(0, size - short, step)]
    columns = np.minimum(np.arange(short + step), size - 1 - np.array([start for _, start in whose])[:, None])
    windows = np.stack([tokens[i, start + column] for (i, start), column in zip(whose, columns, strict=True)])
    if bos:
        windows[:, 0] = [tokens[i, 0] for i, _ in whose]
    return windows, whose


def key_tokens(
    nll: Float[np.ndarray, "D T"],
    short: Float[np.ndarray, "W S"],
    whose: Sequence[tuple[int, int]],
    settings: LongpplConfig,
) -> Bool[np.ndarray, "D T"]:
    """Which tokens after the first of each document are key tokens.

    Args:
        nll: losses given the long context.
        short: losses of all tokens but the first of each of `short_windows`.
        whose: the second result of `short_windows`.
        settings: the thresholds.
    """
    given_short = np.full(nll.shape, -np.inf)
    for row, (i, start) in zip(short, whose, strict=True):
        scored = row[settings.short - 1 :]
        first = start + settings.short - 1
        given_short[i, first : first + len(scored)] = scored[: nll.shape[1] - first]
    return (given_short - nll > settings.gain) & (nll < settings.loss)


def draw(runs: Sequence[Run[Losses]]) -> Figure:
    """Draws LongPPL (solid) and perplexity (dotted) by length, a colour per run, with bars of two standard errors."""
    figure = plots.new_figure(6.5, 3.6)
    axes = figure.subplots()
    for i, run in enumerate(runs):
        style = plots.line_style(i) | {"linewidth": 1.4, "markersize": 4, "capsize": 3}
        lengths = sorted(run.results)
        for name, dashes in (("longppl", "-"), ("perplexity", ":")):
            points = [getattr(run.results[length], name) for length in lengths]
            values, errors = ([float(getattr(x, part)) for x in points] for part in ("value", "stderr"))
            label = run.name if name == "longppl" else None
            axes.errorbar(lengths, values, 2 * np.nan_to_num(errors), label=label, **style | {"linestyle": dashes})
    plots.finish(axes, "Length (tokens)", "LongPPL (solid),\nperplexity (dotted)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = runs[0].lengths
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks], fontsize=8)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def rows(runs: Sequence[Run[Losses]]) -> list[tuple[str, ...]]:
    """Table cells, two rows per run: run, which perplexity, training length, and one column per length."""

    def cell(run: Run[Losses], length: int, name: str) -> str:
        if length not in run.results:
            return "cannot" if length in run.refused else "-"
        found = run.results[length]
        count = f" ({found.key_tokens.sum():,})" if name == "longppl" else ""
        estimate: Estimate = getattr(found, name)
        if not np.isfinite(estimate.value):
            return "-" + count
        error = f" ± {estimate.stderr:.2g}" if np.isfinite(estimate.stderr) else ""
        return f"{estimate.value:.4g}{error}{count}"

    return [
        (run.name, title, f"{run.train_length:,}", *(cell(run, length, name) for length in run.lengths))
        for run in runs
        for title, name in (("LongPPL", "longppl"), ("perplexity", "perplexity"))
    ]
